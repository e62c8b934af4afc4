"""Headers of GGUF files that are damaged, or lie: an error says what is wrong, before memory is taken."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gguf import LLAMA, WIDTH, write_random_gguf

from swarmcore.checkpoint.gguf_header import TENSOR_TYPES, Header, Value, read_header
from swarmcore.checkpoint.gguf_model import GgufModel, open_local
from swarmcore.checkpoint.gguf_writer import GgufContent, Part
from swarmcore.checkpoint.storage import ProgressCounter
from swarmcore.errors import CheckpointError, SwarmError, UnsupportedModelError

INTEGER, TEXT, LIST = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int = INTEGER, content: bytes = struct.pack("<I", 1)) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def tensor(
    name: str = "blk.0.x.weight", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    *tensors: bytes,
    keys: tuple[bytes, ...] = (),
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    stated = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, *stated) + b"".join((*keys, *tensors)) + bytes(data)


def read(content: bytes) -> Header:
    return read_header(lambda start, end: content[start:end], len(content), "model.gguf")


def test_a_sound_header() -> None:
    found = read(file(tensor(shape=(64, 2), kind=8), tensor("b", offset=160), keys=(key("a.b"),)))
    assert found.metadata["a.b"].decode() == 1
    first, second = found.tensors.values()
    assert (first.nbytes, first.end % 32, second.start - first.start) == (136, 8, 160)


DAMAGED = {
    "no GGUF": (b"GGML" + bytes(100), "it begins with b'GGML'"),
    "nothing": (b"", "begins with b''"),
    "the first bytes only": (b"GGUF\3\0\0\0", "truncated"),
    "cut within a key": (file(keys=(key("a", TEXT, text("x" * 50)),))[:60], "truncated"),
    "cut within a tensor": (file(tensor(), data=0)[:50], "truncated|can hold"),
    "more tensors than bytes": (file(counts=(1 << 60, 0)), f"it has {1 << 60} tensors"),
    "more keys than bytes": (file(counts=(0, 1 << 60)), f"it has {1 << 60} keys"),
    "a key of a thousand terabytes": (file(keys=(struct.pack("<Q", 1 << 50),), counts=(0, 1)), "a key has"),
    "a key without a name": (file(keys=(key(""),)), "without a name"),
    "a key that is no text": (file(keys=(text(b"\xff\xfe") + bytes(8),), counts=(0, 1)), "a key is not text"),
    "a key twice": (file(keys=(key("a"), key("a"))), "key 'a' is there twice"),
    "a value of no kind": (file(keys=(key("a", 99),)), "a is of the kind 99"),
    "a list of lists": (file(keys=(key("a", LIST, struct.pack("<IQ", LIST, 1)),)), "an array of the kind 9"),
    "a list that is longer than the file": (
        file(keys=(key("a", LIST, struct.pack("<IQ", INTEGER, 1 << 40)),)),
        "items in a",
    ),
    "a string that is longer than the file": (
        file(keys=(key("a", TEXT, struct.pack("<Q", 1 << 62)),)),
        "truncated",
    ),
    "an alignment that is none": (
        file(keys=(key("general.alignment", INTEGER, struct.pack("<I", 24)),)),
        "alignment is 24",
    ),
    "a name that is too long": (file(tensor("n" * 64)), "name of a tensor has 64"),
    "no dimensions": (file(tensor(shape=())), "0 dimensions"),
    "five dimensions": (file(tensor(shape=(1, 1, 1, 1, 1))), "5 dimensions"),
    "a row of half a block": (file(tensor(shape=(48,), kind=8)), "48 values wide"),
    "a tensor without values": (file(tensor(shape=(0,))), "takes 0 bytes"),
    "a size beyond all numbers": (file(tensor(shape=(1 << 62, 1 << 62))), "takes"),
    "a tensor twice": (file(tensor(), tensor(offset=128)), "blk.0.x.weight is there twice"),
    "tensors that overlap": (file(tensor(), tensor("b", offset=64)), "has to begin at 128"),
    "a gap, as of a wrong type": (file(tensor(shape=(32,), kind=1), tensor("b", offset=128)), "begin at 64"),
    "an offset past the end": (file(tensor(offset=1 << 50)), "has to begin at 0"),
    "a tensor that is cut off": (file(tensor(), data=100), "truncated: .* belong to it"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(what: str) -> None:
    content, said = DAMAGED[what]
    with pytest.raises(CheckpointError, match=rf"^model\.gguf .*({said})"):
        read(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (file(version=1), "version 1 of GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (file(tensor(kind=4)), "of the type 4"),
        (file(tensor(kind=12345)), "of the type 12345"),
    ],
)
def test_what_is_not_known_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read(content)


def test_a_pointer_of_git_lfs() -> None:
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def test_no_memory_is_taken_for_what_is_only_said() -> None:
    tracemalloc.start()
    for content, _ in DAMAGED.values():
        with pytest.raises(SwarmError):
            read(content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_byte_may_be_wrong(data: st.DataObject) -> None:
    content = bytearray(file(tensor(shape=(64, 2), kind=8), tensor("b", offset=160), keys=(key("a.b"),)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 160))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(content))
    except SwarmError:
        return
    assert all(each.end <= len(content) for each in found.tensors.values())


def test_sizes_are_those_of_the_format() -> None:
    """As far as another reader knows them: the newest types may be missing there."""
    for number, kind in TENSOR_TYPES.items():
        if number in set(gguf.GGMLQuantizationType):
            known = gguf.GGMLQuantizationType(number)
            assert (kind.name, kind.block, kind.nbytes) == (known.name, *gguf.GGML_QUANT_SIZES[known])


MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no architecture": (lambda path: write_random_gguf(path, ""), "no general.architecture"),
    "blocks that are missing": (
        lambda path: write_random_gguf(path, each=[LLAMA, LLAMA, {}, LLAMA]),
        "4 blocks, and no tensors of block 2",
    ),
    "blocks that are too many": (
        lambda path: write_random_gguf(path, keys={"block_count": 3}),
        "3 blocks, and tensors of a block 3",
    ),
    "no width": (lambda path: write_random_gguf(path, keys={"embedding_length": 0}), "embedding_length is 0"),
    "a million blocks": (lambda path: write_random_gguf(path, keys={"block_count": 10**6}), "block_count is"),
    "blocks in words": (lambda path: write_random_gguf(path, keys={"block_count": "four"}), "block_count is"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_are_none(what: str, tmp_path: Path) -> None:
    write, said = MODELS[what]
    with pytest.raises(CheckpointError, match=said):
        open_local(write(tmp_path / "model.gguf"))


def test_other_things_than_models(tmp_path: Path) -> None:
    adapter = write_random_gguf(tmp_path / "a.gguf", keys={"general.type": "adapter"})
    with pytest.raises(UnsupportedModelError, match="'adapter'"):
        open_local(adapter)


def test_parts_are_one_model(tmp_path: Path) -> None:
    whole = open_local(write_random_gguf(tmp_path / "whole.gguf"))
    first = write_random_gguf(tmp_path / "split.gguf", parts=3)
    names = sorted(path.name for path in tmp_path.glob("split-*"))
    assert names == [f"split-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    for name in names:
        split = open_local(tmp_path / name)
        assert (split.name, split.blocks, split.width) == ("split", 4, WIDTH)
        assert split.places.keys() == whole.places.keys()
    for tensor_name in ("blk.0.attn_q.weight", "blk.3.ffn_down.weight"):
        assert np.array_equal(*(content_of(model, tensor_name) for model in (whole, split)))
    assert first.name == names[0]


def content_of(model: GgufModel, name: str) -> np.ndarray:
    place = model.places[name]
    return np.frombuffer(place.file.read(place.tensor.start, place.tensor.end), np.uint8)


def test_a_part_without_tensors_counts(tmp_path: Path) -> None:
    """Splitting tools can leave the first part to the metadata; another rope is another model."""
    infos = []
    for number, theta in enumerate((1e4, 1e6)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_random_gguf(folder / "m.gguf", parts=2, keys={"rope.freq_base": theta})
        first, second = sorted(folder.iterdir())
        model = open_local(first)
        head = {**model.metadata, "split.count": Value.of(2, 3)}
        _write(folder / "t-00001-of-00003.gguf", model, GgufContent(head, ()))
        for part, file in enumerate((first, second), 1):
            mine = [Part.copied(place.tensor) for place in model.places.values() if place.file.path == file]
            about = {"split.no": Value.of(2, part), "split.count": Value.of(2, 3)}
            _write(folder / f"t-0000{part + 1}-of-00003.gguf", model, GgufContent(about, tuple(mine)))
        infos.append(open_local(folder / "t-00001-of-00003.gguf").info(tmp_path))
    assert infos[0].fingerprint != infos[1].fingerprint


def _write(path: Path, model: GgufModel, content: GgufContent) -> None:
    with path.open("wb", buffering=0) as file:
        content.write(model, file, ProgressCounter("", content.nbytes, None))


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first = write_random_gguf(tmp_path / "m.gguf", parts=3)
    second, third = (first.with_name(f"m-0000{part}-of-00003.gguf") for part in (2, 3))
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"part 2 \(of 0 to 2\), not 1"):
        open_local(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="part 0"):
        open_local(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf is missing"):
        open_local(third)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_local(alone)
    second.write_bytes(kept)
    assert open_local(first).blocks == 4
    far = tmp_path / "m-00001-of-99999.gguf"
    far.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="more than 1000"):
        open_local(far)

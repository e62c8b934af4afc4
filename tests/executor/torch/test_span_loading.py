from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import CheckpointError, InputError, SpanError, UnsupportedModelError
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.types import Span


def save(folder: Path, model_type: str, **arguments: Any) -> Checkpoint:
    config = AutoConfig.for_model(model_type, **arguments)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return open_checkpoint(str(folder))


TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("span", [Span(0, 6), Span(5, 6), Span(3, 3), Span(-1, 2)], ids=str)
def test_span_outside_the_model(tiny_llama: Checkpoint, span: Span) -> None:
    with pytest.raises(SpanError, match="has blocks 0:5"):
        TorchExecutor.load(tiny_llama, span)


def test_reads_only_the_tensors_of_the_span(tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = tiny_llama.read

    def recording(names: Collection[str], **arguments: Any) -> dict[str, torch.Tensor]:
        read.extend(names)
        return original(names, **arguments)

    monkeypatch.setattr(tiny_llama, "read", recording)
    TorchExecutor.load(tiny_llama, Span(1, 3))
    assert {name.split(".")[2] for name in read} == {"1", "2"}
    assert len(read) == 2 * 9


def test_unknown_dtype_and_device(tiny_llama: Checkpoint) -> None:
    with pytest.raises(InputError, match="int4"):
        TorchExecutor.load(tiny_llama, Span(0, 1), dtype="int4")
    with pytest.raises(InputError, match="tpu"):
        TorchExecutor.load(tiny_llama, Span(0, 1), device="tpu")


def test_missing_tensor(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama_folder, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop("model.layers.2.mlp.up_proj.weight")
    tensors = load_file(shard)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"such as model\.layers\.2\.mlp\.up_proj"):
        TorchExecutor.load(open_checkpoint(str(folder)), Span(1, 4))
    TorchExecutor.load(open_checkpoint(str(folder)), Span(3, 5))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_tensor_of_another_shape(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama_folder, folder)
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, shard, {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=rf"{name} in the shape \["):
        if "layers" in name:
            TorchExecutor.load(checkpoint, Span(1, 4))
        else:
            LocalParts.load(checkpoint)


def test_model_with_other_than_attention_layers(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "lfm2", **TINY, layer_types=["conv", "full_attention"] * 2)
    with pytest.raises(UnsupportedModelError, match="layers of type conv"):
        TorchExecutor.load(checkpoint, Span(0, 2))


def test_family_that_does_not_use_the_attention_interface(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32}
    with pytest.raises(UnsupportedModelError, match="xlnet"):
        TorchExecutor.load(save(tmp_path, "xlnet", **sizes), Span(0, 1))


def test_repr_and_accounting(tiny_llama: Checkpoint) -> None:
    executor = TorchExecutor.load(tiny_llama, Span(1, 3), dtype="bfloat16")
    assert repr(executor).endswith("1:3 bfloat16 on cpu · 0 sequences>")
    assert executor.dtype == "bfloat16"
    assert executor.cache_bytes_per_token == 2 * 2 * 2 * 16 * 2  # blocks, keys and values, heads, size, bytes


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    """Transformers joins the experts of a block, and says in a log which one it lacks."""
    arguments = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    save(tmp_path, "qwen3_moe", **TINY, **arguments)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="some experts or other parts that are joined are missing"):
        TorchExecutor.load(checkpoint, Span(0, 2))

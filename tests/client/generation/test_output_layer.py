"""Who computes the output layer of a client: ggml for a GGUF, unless torch is asked for or needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from tiny_models import save_random_model, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation import local_model, output_layer
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.generation.output_layer import SingleRowsByGgml
from swarmcore.errors import InputError, MissingExtraError, UnsupportedModelError


def opened(folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=259, max_position_embeddings=64))
    path = write_gguf(folder / "model.gguf", model, "llama", keys={})
    return open_checkpoint(str(path), cache_dir=folder / "cache")


def by_ggml(parts: LocalParts) -> bool:
    return any(isinstance(module, SingleRowsByGgml) for module in parts._head_model.modules())


def test_ggml_computes_that_of_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra ggml")
    checkpoint = opened(tmp_path)
    exact = LocalParts.load(checkpoint, dtype="float32")
    assert not by_ggml(exact)
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto", dtype="bfloat16")), "a dtype is torch's"
    assert not by_ggml(LocalParts.load(checkpoint, executor="torch"))
    for executor, dtype in (("auto", "auto"), ("ggml", "float32")):
        parts = LocalParts.load(checkpoint, executor=executor, dtype=dtype)
        assert by_ggml(parts)
        for count in (1, 40):
            rows = torch.randn(count, parts.hidden_size, generator=torch.Generator().manual_seed(1))
            logits, expected = parts.logits(rows), exact.logits(rows)
            assert logits.dtype == torch.float32 and logits.shape == expected.shape
            assert (logits - expected).norm() <= 0.02 * expected.norm()
            torch.testing.assert_close(parts.project(parts.normed(rows)), logits)
        assert not parts.round_head("int4"), "it is in few bits as it is"


def test_models_of_other_kinds_have_torch(tmp_path: Path) -> None:
    save_random_model(tiny_config("llama"), tmp_path / "plain")
    checkpoint = open_checkpoint(str(tmp_path / "plain"), cache_dir=tmp_path)
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto"))
    with pytest.raises(InputError, match="plain is no GGUF, and ggml computes no others; use executor torch"):
        LocalParts.load(checkpoint, executor="ggml")
    with pytest.raises(InputError, match="one of auto, torch, ggml; got 'cuda'"):
        LocalParts.load(checkpoint, executor="cuda")


def test_without_llama_cpp_it_is_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(tmp_path)

    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("llama-cpp-python is not installed")

    monkeypatch.setattr(output_layer, "GgmlMatrix", missing)
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto"))
    with pytest.raises(MissingExtraError):
        LocalParts.load(checkpoint, executor="ggml")
    monkeypatch.setattr(output_layer, "find_spec", lambda name: None)
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto"))


def test_a_bias_is_left_to_torch(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra ggml")
    checkpoint = opened(tmp_path)
    assert checkpoint.gguf is not None
    checkpoint.gguf.places["output.bias"] = checkpoint.gguf.places["output_norm.weight"]
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto"))
    with pytest.raises(UnsupportedModelError, match="has a bias"):
        LocalParts.load(checkpoint, executor="ggml")


def test_a_head_that_is_more_than_a_product_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra ggml")
    checkpoint = opened(tmp_path)
    monkeypatch.setattr(local_model, "_SAME", -1.0)
    assert not by_ggml(LocalParts.load(checkpoint, executor="auto"))
    with pytest.raises(UnsupportedModelError, match="'llama' is no plain product"):
        LocalParts.load(checkpoint, executor="ggml")

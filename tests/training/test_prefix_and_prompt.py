"""Deep prompts and soft prompts: what they are made of, and PEFT's way of laying them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from tiny_models import save_random_model, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from swarmcore.checkpoint import open_checkpoint
from swarmcore.errors import AdapterError
from swarmcore.executor.torch.span import load_span
from swarmcore.training import PrefixAdapter, SoftPrompt
from swarmcore.types import Span

# What peft does with a model gives warnings about the future of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom"])
def test_a_prefix_is_laid_out_as_peft_does(family: str) -> None:
    config = tiny_config(family)
    mine = PrefixAdapter.for_model(config, tokens=3, seed=1)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    )
    embedding = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(mine.to_prompt_embeddings(config))
    cache = theirs.get_prompt(batch_size=2)
    for (name, weight), layer in zip(mine.named_weights().items(), cache.layers, strict=True):
        assert name == f"{cache.layers.index(layer)}.prefix"
        for ours, cached in zip(weight, (layer.keys, layer.values), strict=True):
            assert torch.equal(ours, cached[1].transpose(0, 1))
    back = PrefixAdapter.from_prompt_embeddings(embedding, config)
    assert back.version == mine.version


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "bloom", "gpt_neox", "falcon-7b"])
def test_a_prefix_has_the_shape_that_servers_keep_keys_in(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    save_random_model(config, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    span = load_span(checkpoint, Span(1, 3), dtype=torch.float32, device=torch.device("cpu"))
    (weight,) = PrefixAdapter.for_model(config, tokens=2, blocks=Span(1, 2)).parameters()
    layer = span.layout.layers[0]
    assert weight.shape == (2, 2, layer.heads, layer.key_size)


def test_a_prefix_that_does_not_fit_says_why() -> None:
    config = tiny_config("llama")
    with pytest.raises(AdapterError, match="1 token or more"):
        PrefixAdapter.for_model(config, tokens=0)
    with pytest.raises(AdapterError, match="different sizes"):
        PrefixAdapter.for_model(tiny_config("deepseek_v3"), tokens=2)
    falcon = tiny_config("falcon-40b")
    with pytest.raises(AdapterError, match="kept as state dicts only"):
        PrefixAdapter.for_model(falcon, tokens=2).to_prompt_embeddings(falcon)
    with pytest.raises(AdapterError, match=r"less than all 5 blocks"):
        PrefixAdapter.for_model(config, tokens=2, blocks=Span(0, 4)).to_prompt_embeddings(config)
    with pytest.raises(AdapterError, match=r"takes \[tokens, 320\]: it was made for another model"):
        PrefixAdapter.from_prompt_embeddings(torch.zeros(4, 640), config)


def test_a_soft_prompt_goes_before_embeddings_mask_and_labels() -> None:
    prompt = SoftPrompt.random(2, 4, seed=0)
    inputs = torch.randn(3, 5, 4)
    outputs = prompt(inputs)
    assert torch.equal(outputs[:, 2:], inputs)
    assert all(torch.equal(row, prompt.embeddings) for row in outputs[:, :2])
    mask = torch.tensor([[1, 1, 0]])
    assert prompt.extend_mask(mask).tolist() == [[1, 1, 1, 1, 0]]
    assert prompt.extend_labels(torch.tensor([[7, 8, -100]])).tolist() == [[-100, -100, 7, 8, -100]]
    outputs[:, :2].sum().backward()
    assert prompt.embeddings.grad is not None
    assert torch.equal(prompt.embeddings.grad, torch.full((2, 4), 3.0))
    with pytest.raises(AdapterError, match="another model"):
        prompt(torch.zeros(1, 2, 8))


def test_a_soft_prompt_begins_as_tokens_of_the_vocabulary() -> None:
    words = nn.Embedding(10, 4)
    from_ids = SoftPrompt.from_ids([3, 7], words, tokens=5)
    assert torch.equal(from_ids.embeddings, words.weight[[3, 7, 3, 7, 3]])
    assert SoftPrompt.from_ids([3, 7, 1], words, tokens=2).tokens == 2
    drawn = SoftPrompt.from_vocabulary(4, words, seed=1)
    assert all((words.weight == row).all(dim=1).any() for row in drawn.embeddings)
    assert torch.equal(drawn.embeddings, SoftPrompt.from_vocabulary(4, words, seed=1).embeddings)
    for ids in ([], [3, 10]):
        with pytest.raises(AdapterError):
            SoftPrompt.from_ids(ids, words)

"""What an adapter is meant to do, done to a plain local model: without PEFT, without servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from swarmcore.training import LoraAdapter, PrefixAdapter, SoftPrompt


def hidden_with_adapter(
    model: Any, adapter: LoraAdapter | PrefixAdapter | SoftPrompt, ids: torch.Tensor
) -> Any:
    """Hidden states ``[batch, length, hidden]`` after the final norm, of the tokens of ``ids``."""
    base = model.base_model
    if isinstance(adapter, SoftPrompt):
        embeds = adapter(model.get_input_embeddings()(ids))
        return base(inputs_embeds=embeds).last_hidden_state[:, adapter.tokens :]
    if isinstance(adapter, PrefixAdapter):
        mask = torch.ones(len(ids), adapter.prefix_tokens + ids.shape[1], dtype=torch.long)
        cache = cache_with_prefix(model, adapter, len(ids))
        return base(input_ids=ids, past_key_values=cache, attention_mask=mask).last_hidden_state
    with low_rank_updates(model, adapter):
        return base(input_ids=ids).last_hidden_state


def cache_with_prefix(model: Any, adapter: PrefixAdapter, batch: int) -> DynamicCache:
    """What transformers has cached of so many sequences that begin with the prefix."""
    cache = DynamicCache(config=model.config)
    for index, weight in enumerate(adapter.parameters()):
        keys, values = weight[:, None].expand(2, batch, -1, -1, -1).transpose(2, 3)
        cache.update(keys, values, index)
    return cache


@contextmanager
def low_rank_updates(model: Any, adapter: LoraAdapter) -> Iterator[None]:
    """Within it, the projections of ``model`` are updated."""
    weights = adapter.named_weights()
    hooks = []
    for name in {name.rpartition(".")[0] for name in weights}:
        down, up = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]

        def update(
            module: Any, inputs: Any, output: Any, down: torch.Tensor = down, up: torch.Tensor = up
        ) -> Any:
            return output + adapter.scaling * inputs[0] @ down.T @ up.T

        block, _, path = name.partition(".")
        blocks = getattr(model.base_model, "layers", None) or model.base_model.h
        hooks.append(blocks[int(block)].get_submodule(path).register_forward_hook(update))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

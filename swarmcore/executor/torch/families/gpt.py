"""GPT-J, CodeGen, GPT-Neo, GPT-NeoX Japanese and GPT, whose attention is in a method, ``_attn``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention


class _AttnMethod:
    """In place of ``_attn``: queries, keys and values of a layer go to the current batch.

    All are ``[1, heads, tokens, size]``, and so is the first of the results.
    """

    def __init__(self, layer: int, how: Attention) -> None:
        self.layer, self.how = layer, how

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object = None
    ) -> tuple[torch.Tensor, None]:
        output = current_batch().attend(self.layer, query, key.to(value.dtype), value, self.how)
        return output.transpose(1, 2), None


class _TransposedAttnMethod(_AttnMethod):
    """The same where keys come as ``[1, heads, size, tokens]``, and a list goes back."""

    def __call__(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: object
    ) -> list[torch.Tensor]:
        return [super().__call__(query, key.transpose(2, 3), value)[0]]


def _replace(attentions: Iterable[tuple[Any, Attention]], method: type[_AttnMethod] = _AttnMethod) -> None:
    for layer, (attention, how) in enumerate(attentions):
        attention._attn = method(layer, how)


def replace_gptj(base: Any) -> None:
    """Of a ``GPTJModel`` or ``CodeGenModel``."""
    _replace((block.attn, Attention(1 / block.attn.scale_attn)) for block in base.h)


def replace_gpt_neo(base: Any) -> None:
    """Of a ``GPTNeoModel``, whose scores are not scaled and whose local layers have a window."""
    window = base.config.window_size
    _replace(
        (block.attn.attention, Attention(1.0, window if block.attn.attention_type == "local" else None))
        for block in base.h
    )


def replace_gpt_neox_japanese(base: Any) -> None:
    """Of a ``GPTNeoXJapaneseModel``."""
    _replace((block.attention, Attention(1 / block.attention.norm_factor)) for block in base.layers)


def replace_openai_gpt(base: Any) -> None:
    """Of an ``OpenAIGPTModel``."""
    size = base.config.n_embd // base.config.n_head
    _replace(
        ((block.attn, Attention(size**-0.5 if block.attn.scale else 1.0)) for block in base.h),
        _TransposedAttnMethod,
    )

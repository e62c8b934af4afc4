"""Deep prompts: trained keys and values before every sequence, in every block.

They are PEFT's prefix tuning, which is P-tuning v2 (arXiv 2110.07602). The paper of this system calls them
deep prompt tuning (arXiv 2312.08361, section 2.2).
"""

from __future__ import annotations

from typing import Any, Self

import torch

from swarmcore.errors import AdapterError
from swarmcore.training.adapter import BlockAdapter
from swarmcore.training.model_layout import ModelLayout
from swarmcore.types import Span


class PrefixAdapter(BlockAdapter):
    """Keys and values of ``tokens`` positions before the first token, ``[2, tokens, key heads, head size]``
    for each block.

    Keys are as they lie in the attention cache: a rotary embedding is not applied to them. The first token of
    a sequence is at position ``tokens``.
    """

    def __init__(self, values: torch.Tensor, *, first: int = 0) -> None:
        """Of ``values``, ``[blocks, 2, tokens, key heads, head size]``, for the blocks from ``first`` on."""
        super().__init__(prefix_tokens=values.shape[2])
        for index, prefix in enumerate(values.unbind()):
            self._add_weight(f"{first + index}.prefix", prefix.clone())

    @classmethod
    def for_model(
        cls,
        model_config: Any,
        *,
        tokens: int,
        blocks: Span | None = None,
        std: float = 1.0,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A new prefix, drawn from a normal distribution as PEFT's is, whose ``std`` is 1; 0 is all zeros.

        ``model_config`` is the Transformers config of the whole model. ``blocks`` are all blocks where None;
        PEFT's file format has no prefix of less. Without a ``seed``, torch's global generator is used.

        Raise `AdapterError` for less than one token, and for models whose keys and values differ in size.
        """
        if tokens < 1:
            raise AdapterError(f"a prefix has 1 token or more, got {tokens}")
        if std < 0:
            raise AdapterError(f"the standard deviation must not be below 0, got {std}")
        layout = ModelLayout.of(model_config)
        span = layout.span(blocks)
        heads, size = prefix_shape(layout)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        shape = (len(span), 2, tokens, heads, size)
        values = torch.randn(shape, generator=generator, dtype=torch.float32) * std
        return cls(values.to(dtype), first=span.start)

    @classmethod
    def from_prompt_embeddings(cls, embeddings: torch.Tensor, model_config: Any) -> Self:
        """From PEFT's layout, ``[tokens, blocks * 2 * key heads * head size]``.

        Raise `AdapterError` when that is not the shape for this model.
        """
        layout = ModelLayout.of(model_config)
        return cls(unpack_prompt_embeddings(embeddings, layout, layout.span(None)))

    def to_prompt_embeddings(self, model_config: Any) -> torch.Tensor:
        """In PEFT's layout, ``[tokens, blocks * 2 * key heads * head size]``.

        Raise `AdapterError` when it does not have the blocks of this model, all of them.
        """
        layout = ModelLayout.of(model_config)
        _check_format(layout)
        if self.covered_blocks != tuple(range(layout.blocks)):
            raise AdapterError(
                f"the prefix is for blocks {list(self.covered_blocks)}, and PEFT's format has no prefix of "
                f"less than all {layout.blocks} blocks"
            )
        values = torch.stack([weight.detach() for _, weight in self._weights()])
        if tuple(values.shape[3:]) != prefix_shape(layout):
            raise AdapterError(
                f"the prefix has {values.shape[3]} heads of size {values.shape[4]}, and the model "
                f"{' of size '.join(map(str, prefix_shape(layout)))}"
            )
        return values.permute(2, 0, 1, 3, 4).reshape(self.prefix_tokens, -1)


def prefix_shape(layout: ModelLayout) -> tuple[int, int]:
    """Key heads and head size, or `AdapterError`."""
    if layout.kv_shape is None:
        raise AdapterError(
            f"{layout.model_type} has keys and values of different sizes, for which there is no prefix; use "
            f"a soft prompt or low-rank updates"
        )
    return layout.kv_shape


def unpack_prompt_embeddings(embeddings: torch.Tensor, layout: ModelLayout, span: Span) -> torch.Tensor:
    """``[blocks of the span, 2, tokens, key heads, head size]`` of PEFT's layout of all blocks.

    Raise `AdapterError` when the shape is not that of this model.
    """
    _check_format(layout)
    heads, size = prefix_shape(layout)
    width = layout.blocks * 2 * heads * size
    if embeddings.dim() != 2 or embeddings.shape[0] < 1 or embeddings.shape[1] != width:
        raise AdapterError(
            f"the prefix has the shape {list(embeddings.shape)}; a model of {layout.blocks} blocks with "
            f"{heads} key heads of size {size} takes [tokens, {width}]: it was made for another model"
        )
    values = embeddings.view(-1, layout.blocks, 2, heads, size).permute(1, 2, 0, 3, 4)
    return values[span.start : span.end]


def _check_format(layout: ModelLayout) -> None:
    if layout.repeats_keys:
        raise AdapterError(
            f"PEFT's format has a key for every query head of this {layout.model_type} model, where servers "
            f"have one for several: prefixes of it are kept as state dicts only"
        )

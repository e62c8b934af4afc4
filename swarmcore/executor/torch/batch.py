"""What the layers of a model ask of the batch that goes through them: attention, and what adapters add.

The families' layers stay as transformers has them. Their attention calls `AttentionBatch.attend`, and a hook
on each projection that an adapter changes calls `AdapterUpdates.add`, so that no module is any one adapter's
own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Bias(Protocol):
    """What some families add to attention scores by the position of the key (ALiBi)."""

    def keys(self, count: int) -> torch.Tensor:
        """float32 ``[1, heads, 1, count]``: what is added for each of the first ``count`` keys."""


class Attention(NamedTuple):
    """How one layer attends, apart from queries, keys and values."""

    scale: float
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it."""
    chunk: int | None = None
    """A token sees those before it from the last position on that is divisible by ``chunk``."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """One more score for each head, ``[heads]``, that takes part in the softmax and has no value."""
    bias: Bias | None = None

    @property
    def explicit(self) -> bool:
        """Whether scores have to be computed step by step, since no fused kernel takes all of it."""
        return self.softcap is not None or self.sinks is not None

    def first_key(self, position: int) -> int:
        """The earliest position that a token at ``position`` sees, or any token after it."""
        first = max(0, position + 1 - self.window) if self.window else 0
        return max(first, position - position % self.chunk) if self.chunk else first


class TargetModule:
    """A projection in a block that adapters may change."""

    def __init__(self, block: int, module: str) -> None:
        """``module`` is its name inside of the block ``block``."""
        self.block, self.module = block, module
        self.lora_a, self.lora_b = f"{block}.{module}.lora_A", f"{block}.{module}.lora_B"
        """What an adapter's weights for it are called."""


class AdapterUpdates(Protocol):
    """What adapters add to the outputs of projections in one batch."""

    def add(self, target: TargetModule, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The projection's ``output`` for the inputs ``rows``, with what is added to it.

        Both have the batch's tokens in order. May change ``output``.
        """


class AttentionBatch(Protocol):
    """What the attention of a layer calls."""

    updates: AdapterUpdates | None
    """What adapters change in it."""
    origin: int
    """The block of the model that the numbers of layers count from."""
    position_ids: torch.Tensor
    """Where each token is in its sequence, ``[1, tokens]``."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        """Store the new keys and values of ``layer`` and attend.

        ``query``, ``key`` and ``value`` are ``[1, heads, tokens, size]``; the result is
        ``[1, tokens, heads, size]``.
        """


def causal_mask(
    start: int, end: int, how: Attention, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """What is added to the scores of the tokens ``start:end``, ``[1, 1 or heads, tokens, keys]``.

    The keys are those from ``how.first_key(start)`` on. None when nothing is added.
    """
    first = how.first_key(start)
    mask = None
    if end - start > 1:
        queries = torch.arange(start, end, device=device).unsqueeze(1)
        keys = torch.arange(first, end, device=device)
        hidden = keys > queries
        if how.window:
            hidden |= keys <= queries - how.window
        if how.chunk:
            hidden |= keys < queries - queries % how.chunk
        mask = torch.zeros(hidden.shape, dtype=torch.float32 if how.bias else dtype, device=device)
        mask = mask.masked_fill_(hidden, float("-inf")).view(1, 1, end - start, -1)
    if how.bias:
        bias = how.bias.keys(end)[..., first:]
        mask = bias if mask is None else mask + bias
        if device.type != "cpu":
            # CPUs take float32 masks at any dtype; kernels of GPUs refuse them, or misread them.
            mask = mask.to(dtype)
    return mask

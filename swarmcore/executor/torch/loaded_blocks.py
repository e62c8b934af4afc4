"""The blocks an executor holds: one model if they were loaded together, several once its span has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swarmcore.errors import SpanError
from swarmcore.executor.torch.kv_cache import CacheLayout
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.span import SpanModel
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.types import Span


class LoadedBlocks:
    """Models of consecutive spans, run one after the other. Never changed: a new one takes its place."""

    def __init__(self, models: Sequence[SpanModel]) -> None:
        """``models`` in any order; together they are one span, or nothing at all."""
        self.models = sorted(models, key=lambda model: model.span)

    @property
    def span(self) -> Span | None:
        if not self.models:
            return None
        return Span(self.models[0].span.start, self.models[-1].span.end)

    def holds(self, part: Span) -> bool:
        return self.span is not None and common(self.span, part) == part

    def check(self, part: Span) -> None:
        """Raise `SpanError` unless all blocks of ``part`` are here."""
        if not self.holds(part):
            raise SpanError(f"blocks {part} are not held here, only {self.span or 'none as yet'}")

    def keep(self, part: Span | None) -> LoadedBlocks:
        """Only the blocks of ``part``."""
        kept = [(model, common(model.span, part)) for model in self.models if part]
        return LoadedBlocks(
            [model if model.span == inner else model.keep(inner) for model, inner in kept if inner]
        )

    def layout(self, part: Span) -> CacheLayout:
        """What caches of a sequence that passes through ``part`` look like."""
        assert self.span is not None
        first = part.start - self.span.start
        layers = tuple(layer for model in self.models for layer in model.layout.layers)
        layout = self.models[0].layout
        return CacheLayout(layers[first : first + len(part)], layout.dtype, layout.device)

    def forward(self, hidden: torch.Tensor, batch: RaggedBatch, part: Span) -> torch.Tensor:
        """Hidden states ``[1, tokens, hidden size]`` through the blocks ``part``."""
        for model in self.models:
            if inner := common(model.span, part):
                batch.first_layer = part.start - model.origin
                hidden = model.forward(hidden, batch.position_ids, batch, inner)
        return hidden

    def differentiable(self, hidden: torch.Tensor, batch: UncachedBatch, part: Span) -> torch.Tensor:
        """As `forward`, of whole sequences, for gradients where they are enabled."""
        for model in self.models:
            if inner := common(model.span, part):
                batch.origin = model.origin
                hidden = model.differentiable(hidden, batch.position_ids, batch, inner)
        return hidden

    def block(self, number: int) -> nn.Module:
        """Block ``number`` of the whole model, which must be held."""
        return next(model for model in self.models if number in model.span).block(number)


def common(one: Span, other: Span | None) -> Span | None:
    """The blocks that are in both; None when there are none."""
    if other is None:
        return None
    start, end = max(one.start, other.start), min(one.end, other.end)
    return Span(start, end) if start < end else None

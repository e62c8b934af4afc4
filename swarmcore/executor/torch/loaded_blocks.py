"""The blocks that an executor has loaded: one model, or several once its span has changed."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import nn

from swarmcore.errors import SpanError
from swarmcore.executor.torch.batch import AttentionBatch
from swarmcore.executor.torch.cache_pages import CacheLayout
from swarmcore.executor.torch.span import SpanModel
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
        return self.span is not None and self.span.covers(part)

    def check(self, part: Span) -> None:
        """Raise `SpanError` unless all blocks of ``part`` are here."""
        if not self.holds(part):
            raise SpanError(f"blocks {part} are not held here, only {self.span or 'none as yet'}")

    def keep(self, part: Span) -> LoadedBlocks:
        """Only those that are blocks of ``part``."""
        kept = [(model, model.span.overlap(part)) for model in self.models]
        return LoadedBlocks(
            [model if model.span == inner else model.keep(inner) for model, inner in kept if inner]
        )

    def layout(self, part: Span) -> CacheLayout:
        """What caches of a sequence that passes through ``part`` look like."""
        assert self.span is not None
        first = part.start - self.span.start
        layers = tuple(layer for model in self.models for layer in model.layout.layers)
        layout = self.models[0].layout
        return attrs.evolve(layout, layers=layers[first : first + len(part)])

    def forward(self, hidden: torch.Tensor, batch: AttentionBatch, part: Span) -> torch.Tensor:
        """Hidden states ``[1, tokens, hidden size]`` through the blocks ``part``."""
        for model in self.models:
            if inner := model.span.overlap(part):
                batch.origin = model.origin
                hidden = model.forward(hidden, batch, inner)
        return hidden

    def block(self, number: int) -> nn.Module:
        """Block ``number`` of the whole model, which must be held."""
        return next(model for model in self.models if number in model.span).block(number)

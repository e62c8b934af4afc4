"""The join rule: which blocks a server takes when it comes to a swarm."""

from __future__ import annotations

import random
from collections.abc import Sequence

from swarmcore.errors import InputError
from swarmcore.placement.swarm_throughput import block_throughputs, placements
from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, Span


def join_span(
    view: SwarmView, model: ModelInfo, size: int, rng: random.Random, *, peer: PeerId, start_step: int = 1
) -> Span:
    """The ``size`` consecutive blocks that the swarm serves worst, for ``peer`` to take.

    After arXiv 2312.08361, section 3.3: among all spans of that size the one whose per-block throughputs,
    sorted, are lexicographically the least. Among equals `tiles` are preferred, and then ``rng`` decides, so
    that servers that come at the same time spread. A ``size`` of the model's blocks or more gives all.

    Where spans begin at multiples of ``start_step`` blocks, the size is made such a multiple, lest nobody
    could take what comes after the span; the last span of the model may be shorter. Raise `InputError` for a
    size below ``start_step``.
    """
    if size < min(start_step, model.blocks):
        raise InputError(
            f"{size} blocks fit here, and {model.name} is cut after every {start_step} blocks only: give the "
            f"server more memory, fewer cache tokens, or weights in fewer bits"
        )
    if size < model.blocks:
        size -= size % start_step
    throughputs = block_throughputs(placements(view, model, without=peer), model.blocks)
    return rng.choice(tiles(worst_spans(throughputs, size, start_step), throughputs))


def worst_spans(throughputs: Sequence[float], size: int, start_step: int = 1) -> list[Span]:
    """The spans of ``size`` blocks that are served worst: several when they are equally so, in order.

    They begin at multiples of ``start_step``; the last one may be shorter for that.
    """
    blocks = len(throughputs)
    size = min(size, blocks)
    starts = range(0, blocks - size + start_step, start_step)
    # Most spans are ruled out by their worst block, without sorting.
    least = {start: min(throughputs[start : start + size]) for start in starts}
    lowest = min(least.values())
    ranked = {
        start: sorted(throughputs[start : start + size]) for start, value in least.items() if value == lowest
    }
    worst = min(ranked.values())
    return [Span(start, min(start + size, blocks)) for start, values in ranked.items() if values == worst]


def tiles(spans: Sequence[Span], throughputs: Sequence[float]) -> list[Span]:
    """Of spans that are served equally badly, those that leave room for others of the same size beside them.

    A stretch of equally served blocks is tiled from both of its ends; a server in the middle of it would
    leave gaps that later ones cannot fill without overlap. All of ``spans`` when none is such a tile.
    """
    before, after = _run_lengths(throughputs), _run_lengths(throughputs[::-1])[::-1]
    return [
        span for span in spans if before[span.start] % len(span) == 0 or after[span.end - 1] % len(span) == 0
    ] or list(spans)


def _run_lengths(values: Sequence[float]) -> list[int]:
    """For each value, how many equal ones come right before it."""
    lengths: list[int] = []
    for index, value in enumerate(values):
        lengths.append(lengths[-1] + 1 if index and value == values[index - 1] else 0)
    return lengths

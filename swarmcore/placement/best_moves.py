"""What a swarm could carry if its servers were elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from swarmcore.placement.choice import tiles, worst_spans
from swarmcore.placement.swarm_throughput import Placement, add, block_throughputs
from swarmcore.types import PeerId

MAX_ROUNDS = 20
"""Most times that every server is given a chance to move; a handful is usual."""


@attrs.frozen
class BestMoves:
    """An arrangement that no server could better by a move of its own."""

    throughput: float
    """Tokens per second through the block that is served worst."""
    moved: frozenset[PeerId]
    """The servers that are elsewhere than they were."""


def best_moves(placed: Sequence[Placement], blocks: int) -> BestMoves:
    """Let all servers move, one after the other, each to where it helps most, until none gains.

    A server gains when the throughputs of all blocks, sorted, become lexicographically greater: this can
    not go on for ever. The fastest servers go first. As in arXiv 2312.08361, section 3.3, the result is an
    arrangement that is stable, not always the best of all.
    """
    throughputs = block_throughputs(placed, blocks)
    order = sorted(placed, key=lambda each: (-each.throughput, each.peer))
    spans = {each.peer: each.span for each in order}
    for _ in range(MAX_ROUNDS):
        before = dict(spans)
        for each in order:
            moved = better_place(throughputs, attrs.evolve(each, span=spans[each.peer]))
            if moved is not None:
                add(throughputs, spans[each.peer], -each.throughput)
                add(throughputs, moved.span, each.throughput)
                spans[each.peer] = moved.span
        if spans == before:
            break
    return BestMoves(
        min(throughputs), frozenset(each.peer for each in placed if spans[each.peer] != each.span)
    )


def better_place(throughputs: list[float], server: Placement) -> Placement | None:
    """Where ``server``, which ``throughputs`` include, would help more than where it is; None: nowhere."""
    span, own = server.span, server.throughput
    lowest = min(throughputs)
    # Whichever way it went, it would leave its first or its last block, and that would be the new worst.
    if throughputs[span.start] - own < lowest and throughputs[span.end - 1] - own < lowest:
        return None
    rest = list(throughputs)
    add(rest, span, -own)
    candidates = worst_spans(rest, len(span))
    if span in candidates:
        return None
    moved = attrs.evolve(server, span=tiles(candidates, rest)[0])
    return moved if improves(throughputs, server, moved) else None


def improves(throughputs: Sequence[float], server: Placement, moved: Placement) -> bool:
    """Whether the sorted per-block throughputs become lexicographically greater when ``server`` moves."""
    after = list(throughputs)
    add(after, server.span, -server.throughput)
    add(after, moved.span, moved.throughput)
    return sorted(after) > sorted(throughputs)

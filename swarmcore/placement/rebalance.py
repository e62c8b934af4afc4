"""When a server should move to other blocks, and where to."""

from __future__ import annotations

import random
from collections.abc import Collection

import attrs

from swarmcore.placement.best_moves import best_moves, improves
from swarmcore.placement.choice import tiles, worst_spans
from swarmcore.placement.swarm_throughput import (
    Placement,
    block_throughputs,
    mean_throughput,
    placements,
    present_placement,
    unique_blocks,
)
from swarmcore.registry.base import SwarmView
from swarmcore.types import PeerId, ServerInfo, Span

HORIZON = 600.0
"""Seconds within which a move has to pay for itself: swarms do not stay as they are for much longer."""


@attrs.frozen
class MoveCost:
    """What a server gives up when it moves."""

    seconds_per_block: float = 1.0
    """How long it takes to load a block."""
    cached_tokens: int = 0
    """Tokens in its caches, which other servers would have to compute again."""


@attrs.frozen
class Decision:
    """To move to ``target``, or to stay when that is None, and why, in words for people."""

    target: Span | None
    reason: str

    def __str__(self) -> str:
        return self.reason


class Rebalancer:
    """Decides for one server, on its own view of the swarm, whether it should hold other blocks.

    After arXiv 2312.08361, section 3.3, with the cost of moving in the objective. A server moves when

    - the swarm runs below ``balance_quality`` of what everyone's best moves would give,
    - its own move makes the sorted per-block throughputs lexicographically greater, which alone rules out
      that servers move in circles,
    - the tokens gained within ``horizon`` seconds, shared out among those who would have to move, are more
      than those lost: caches to be computed again, and service missed while it loads,
    - someone else is online on every block that it leaves.

    To decide takes two steps. `look` proposes a move; the server then announces it as its target, waits until
    the announcement has gone round, and asks `confirm` on a fresh view. Of servers that have proposed moves
    at the same time those with lower peer ids yield: they count the others' moves as done, while the others
    count theirs as not. A block that both would leave without a holder is left by neither.
    """

    def __init__(
        self,
        peer: PeerId,
        rng: random.Random,
        *,
        balance_quality: float = 0.75,
        horizon: float = HORIZON,
    ) -> None:
        self.peer = peer
        self.balance_quality = balance_quality
        self.horizon = horizon
        self._rng = rng
        self._moving: Collection[PeerId] = ()

    def look(self, view: SwarmView, server: ServerInfo, cost: MoveCost) -> Decision:
        """Propose a move of ``server``, which is this peer as it is now, or to stay."""
        self._moving = frozenset(other.peer for other in view if other.target is not None)
        assert server.model is not None
        assert server.span is not None
        blocks = server.model.blocks
        if len(server.span) >= blocks:
            return _stay("it holds the whole model")
        others = placements(view, server.model, without=self.peer)
        alone = unique_blocks(view, server)
        if alone is not None and len(alone) == len(server.span):
            return _stay(f"nobody else holds blocks {alone}")
        here = present_placement(server, others)
        rest = block_throughputs(others, blocks)
        candidates = worst_spans(rest, len(server.span), around=alone)
        if server.span in candidates:
            unique = f" that keep {alone}, which nobody else holds," if alone else ""
            return _stay(f"of all spans{unique} the swarm needs {server.span} most")
        return self._weigh(others, here, self._rng.choice(tiles(candidates, rest)), blocks, cost)

    def confirm(self, view: SwarmView, server: ServerInfo, target: Span, cost: MoveCost) -> Decision:
        """Decide again what `look` proposed, now that ``view`` shows what others have announced since."""
        assert server.model is not None
        assert server.span is not None
        yielding = [
            other.peer
            for other in view
            if other.target is not None and other.peer not in self._moving and other.peer < self.peer
        ]
        others = placements(view, server.model, without=self.peer, staying=yielding)
        alone = unique_blocks(view, server)
        if alone is not None and not (target.start <= alone.start and alone.end <= target.end):
            return _stay(f"nobody else would be left to hold blocks {alone}")
        here = present_placement(server, others)
        return self._weigh(others, here, target, server.model.blocks, cost)

    def _weigh(
        self, others: list[Placement], here: Placement, target: Span, blocks: int, cost: MoveCost
    ) -> Decision:
        placed = [*others, here]
        throughputs = block_throughputs(placed, blocks)
        if not improves(throughputs, here, attrs.evolve(here, span=target)):
            return _stay(f"to move to {target} would not help")
        now = min(throughputs)
        # No arrangement beats the mean, which is cheap to know.
        possible = mean_throughput(placed, blocks)
        if now >= self.balance_quality * possible:
            return _stay(f"the swarm runs at {_percent(now, possible)} of its throughput or more")
        best = best_moves(placed, blocks)
        quality = f"the swarm runs at {_percent(now, best.throughput)} of what moves could give"
        if now >= self.balance_quality * best.throughput:
            return _stay(quality)
        share = len(target) / blocks
        gained = self.horizon * (best.throughput - now) / max(1, len(best.moved))
        fresh = len(target) - overlap(here.span, target)
        lost = share * (here.throughput * fresh * cost.seconds_per_block + cost.cached_tokens)
        balance = f"gain {gained:,.0f} tokens in {self.horizon:.0f} s, cost {lost:,.0f}"
        if gained <= lost:
            return _stay(f"{quality}, but to move to {target} would {balance}")
        return Decision(target, f"moving from {here.span} to {target}: {quality}; {balance}")


def look_delay(interval: float, rng: random.Random) -> float:
    """Seconds to the next look, ``interval`` on average: anywhere from a half to one and a half of it."""
    return interval * rng.uniform(0.5, 1.5)


def overlap(one: Span, other: Span) -> int:
    """How many blocks two spans share."""
    return max(0, min(one.end, other.end) - max(one.start, other.start))


def _stay(reason: str) -> Decision:
    return Decision(None, f"staying: {reason}")


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "100 %"

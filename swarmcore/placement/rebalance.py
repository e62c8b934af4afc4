"""When a server should move to other blocks, and where to."""

from __future__ import annotations

import random
from collections.abc import Collection

import attrs

from swarmcore.placement.move_plan import ENOUGH, HORIZON, MovePlan, plan_moves
from swarmcore.placement.swarm_throughput import (
    Placement,
    add,
    block_throughputs,
    mean_throughput,
    placements,
)
from swarmcore.registry.base import SwarmView
from swarmcore.types import PeerId, ServerInfo, Span

HYSTERESIS = 0.005
"""A swarm that would gain no more than this share is left alone, even where moves cost nothing."""


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

    After arXiv 2312.08361, section 3.3, with the cost of moving in the objective. All servers work out the
    same plan (`plan_moves`); one moves when

    - the plan has a move for it, which no other one has to come before,
    - the tokens gained within `HORIZON` seconds, shared out among those who would have to move, are more
      than those lost: caches to be computed again, and service that the swarm misses while it loads,
    - the swarm runs below ``balance_quality`` of what the plan would give if the move costs all that it
      gains, and below 1 - `HYSTERESIS` if it costs nothing; in between, in proportion,
    - someone else is online on every block that it leaves.

    To decide takes two steps. `look` proposes a move; the server then announces it as its target, waits until
    the announcement has gone round, and asks `confirm` on a fresh view. Of servers that have proposed moves
    at the same time those with lower peer ids yield: they count the others' moves as done, while the others
    count theirs as not. A block that both would leave without a holder is left by neither.
    """

    def __init__(self, peer: PeerId, *, balance_quality: float = 0.75, horizon: float = HORIZON) -> None:
        self.peer = peer
        self.balance_quality = balance_quality
        self.horizon = horizon
        self._moving: Collection[PeerId] = ()

    def look(self, view: SwarmView, server: ServerInfo, cost: MoveCost) -> Decision:
        """Propose a move of ``server``, which is this peer as it is now, or to stay."""
        self._moving = frozenset(other.peer for other in view if other.target is not None)
        return self._decide(view, server, cost)

    def confirm(self, view: SwarmView, server: ServerInfo, target: Span, cost: MoveCost) -> Decision:
        """Decide again what `look` proposed, now that ``view`` shows what others have announced since."""
        yielding = [
            other.peer
            for other in view
            if other.target is not None and other.peer not in self._moving and other.peer < self.peer
        ]
        decision = self._decide(view, server, cost, yielding)
        if decision.target not in (target, None):
            return _stay(
                f"others have changed their minds: now {decision.target} would help more than {target}"
            )
        return decision

    def _decide(
        self, view: SwarmView, server: ServerInfo, cost: MoveCost, yielding: Collection[PeerId] = ()
    ) -> Decision:
        assert server.model is not None
        blocks = server.model.blocks
        me = attrs.evolve(server, target=None)
        placed = placements(SwarmView({**view.servers, self.peer: me}), server.model, staying=yielding)
        here = next(each for each in placed if each.peer == self.peer)
        if len(here.span) >= blocks:
            return _stay("it holds the whole model")
        if here.keeps == here.span:
            return _stay(f"nobody else holds blocks {here.span}, or will")
        throughputs = block_throughputs(placed, blocks)
        now = min(throughputs)
        # No arrangement beats the mean, which is cheap to know.
        possible = mean_throughput(placed, blocks)
        if now >= ENOUGH * possible:
            return _stay(f"the swarm runs at {_percent(now, possible)} of its throughput or more")
        plan = plan_moves(tuple(sorted(placed, key=lambda each: each.peer)), blocks)
        return self._weigh(plan, throughputs, here, cost)

    def _weigh(self, plan: MovePlan, throughputs: list[float], here: Placement, cost: MoveCost) -> Decision:
        now = min(throughputs)
        quality = f"the swarm runs at {_percent(now, plan.throughput)} of what moves could give"
        move = plan.move_of(self.peer)
        if move is not None and self.peer not in plan.ready:
            return _stay(f"{quality}, and others have to move before it goes to {move.target}")
        if move is None:
            return _stay(f"{quality}, and others' moves help more" if plan.moves else "no move would help")
        share = len(here.span) / len(throughputs)
        gained = self.horizon * (plan.throughput - now) / len(plan.moves)
        lost = share * cost.cached_tokens + missed_while_loading(throughputs, here, move.target, cost)
        balance = f"gain {gained:,.0f} tokens in {self.horizon:.0f} s, cost {lost:,.0f}"
        worth = f"to move to {move.target} would {balance}"
        if gained <= lost:
            return _stay(f"{quality}, but {worth}")
        needed = min(1 - HYSTERESIS, 1 - (1 - self.balance_quality) * lost / gained)
        if now >= needed * plan.throughput:
            return _stay(f"{quality}, {100 * needed:.0f} % is enough, as {worth}")
        return Decision(move.target, f"moving from {here.span} to {move.target}: {quality}; {balance}")


def missed_while_loading(throughputs: list[float], here: Placement, target: Span, cost: MoveCost) -> float:
    """Tokens that the swarm does not carry while the server loads: none where the blocks it leaves do not
    become the worst ones."""
    without = list(throughputs)
    add(without, here.span, -here.throughput)
    kept = here.span.overlap(target)
    if kept is not None:
        add(without, kept, here.throughput)
    fresh = len(target) - (len(kept) if kept is not None else 0)
    return max(0.0, min(throughputs) - min(without)) * fresh * cost.seconds_per_block


def look_delay(interval: float, rng: random.Random) -> float:
    """Seconds to the next look, ``interval`` on average: anywhere from a half to one and a half of it."""
    return interval * rng.uniform(0.5, 1.5)


def _stay(reason: str) -> Decision:
    return Decision(None, f"staying: {reason}")


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "100 %"

"""Which moves, made together, would raise what a swarm can carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import nsmallest
from itertools import accumulate
from operator import itemgetter

import attrs

from swarmcore.placement.swarm_throughput import Placement, add, block_throughputs, mean_throughput
from swarmcore.types import PeerId, Span

ENOUGH = 0.99
"""Share of the upper bound above which no move is looked for."""

LEVEL = 0.97
"""Share of the upper bound that a search wants all blocks to have: few arrangements reach more."""

WORTH = 0.0015
"""Share of the upper bound that each move of a plan has to add, on average."""

HORIZON = 600.0
"""Seconds within which a move has to pay for itself: swarms do not stay as they are for much longer."""

MAX_AHEAD = 6
"""Moves that a search looks ahead."""

FAR = 0.8
"""Share of the upper bound below which many blocks may be as bad as the worst one, so that only many moves
help: it looks further ahead, until it has found some."""

FAR_AHEAD = 12
"""Moves that it looks ahead then, once no block is missing."""

MAX_MOVERS = 64
"""Servers that a search considers: those that are missed least where they are."""

WIDTH = 10
"""Arrangements that a search goes on from after each move."""

BRANCHES = 5
"""Moves that it tries from each of these."""


@attrs.frozen
class Move:
    """A server goes to ``target``."""

    peer: PeerId
    target: Span


@attrs.frozen
class MovePlan:
    """Moves that help, if all of them are made."""

    moves: tuple[Move, ...]
    """In an order in which no block is ever served worse than the worst one before. No server moves twice."""
    ready: frozenset[PeerId]
    """Servers that can move at once: no other one has to move before, lest the worst block gets worse."""
    throughput: float
    """Tokens per second through the block that is served worst, after all moves."""

    def move_of(self, peer: PeerId) -> Move | None:
        """Where ``peer`` goes, at once or later; None when it stays."""
        return next((move for move in self.moves if move.peer == peer), None)


@lru_cache(maxsize=8)
def plan_moves(placed: tuple[Placement, ...], blocks: int) -> MovePlan:
    """The moves that raise the throughput of the block that is served worst, as far as they are worth it.

    Equal arguments give the same plan, so that servers with the same view agree on who moves. In arXiv
    2312.08361, section 3.3, each server asks what would be best for it to do; here all look for moves of
    several servers that help together, even where none of them does alone.
    """
    throughputs = block_throughputs(placed, blocks)
    possible = mean_throughput(placed, blocks)
    if min(throughputs) >= ENOUGH * possible:
        return MovePlan((), frozenset(), min(throughputs))
    moves = best_moves(placed, blocks, worth=WORTH * possible)
    servers = {each.peer: each for each in placed}
    after = throughputs
    for move in moves:
        after = moved(after, servers[move.peer], move.target)
    ready = frozenset(
        move.peer
        for move in moves
        if min(moved(throughputs, servers[move.peer], move.target)) >= min(throughputs)
    )
    return MovePlan(moves, ready, min(after))


def best_moves(
    placed: Sequence[Placement],
    blocks: int,
    *,
    worth: float = 0.0,
    width: int = WIDTH,
    branches: int = BRANCHES,
) -> tuple[Move, ...]:
    """The moves after which the worst block has most, less ``worth`` and `Placement.lost` for each of them.

    A beam search: from each of the ``width`` best arrangements it goes on with the ``branches`` best moves.
    On the way those are best that lack least, summed over the squares of what blocks have below `LEVEL`: the
    worst block alone does not tell whether a move is a step to a better arrangement. Empty when no moves
    help that can be made one after the other without making the worst block worse.
    """
    throughputs = block_throughputs(placed, blocks)
    possible = mean_throughput(placed, blocks)
    level = LEVEL * possible
    furthest = FAR_AHEAD if min(throughputs) < FAR * possible else MAX_AHEAD
    servers = _movers(placed, throughputs)
    best: tuple[Move, ...] = ()
    value = min(throughputs)
    beam = [_Arrangement(throughputs, {}, 0.0)]
    ahead = 0
    while beam and ahead < (MAX_AHEAD if best else furthest):
        steps = [
            (lacking, _with(arrangement.targets, index, start), arrangement)
            for arrangement in beam
            for lacking, index, start in nsmallest(branches, _steps(arrangement, servers, level))
        ]
        steps.sort(key=itemgetter(0))
        beam, seen = [], set()
        for _, targets, origin in steps:
            key = frozenset(targets.items())
            if key in seen:  # the same moves in another order
                continue
            seen.add(key)
            arrangement = origin.after(targets, servers, worth)
            beam.append(arrangement)
            if arrangement.value > value and (moves := _in_order(targets, servers, throughputs)) is not None:
                best, value = moves, arrangement.value
            if len(beam) == width:
                break
        ahead += any(min(arrangement.throughputs) > 0 for arrangement in beam)
    return best


def moved(throughputs: Sequence[float], server: Placement, target: Span) -> list[float]:
    """What ``throughputs``, which include ``server``, become when it goes to ``target``."""
    after = list(throughputs)
    add(after, server.span, -server.throughput)
    add(after, target, server.throughput)
    return after


@attrs.frozen
class _Arrangement:
    throughputs: list[float]
    targets: dict[int, int]
    """Who has moved, by index, and the first block that it holds now."""
    cost: float
    """Tokens per second that all these moves have to add."""

    @property
    def value(self) -> float:
        return min(self.throughputs) - self.cost

    def after(self, targets: dict[int, int], servers: Sequence[Placement], worth: float) -> _Arrangement:
        """With the last one of ``targets`` made as well."""
        index, start = next(reversed(targets.items()))
        server = servers[index]
        throughputs = moved(self.throughputs, server, Span(start, start + len(server.span)))
        return _Arrangement(throughputs, targets, self.cost + worth + server.lost / HORIZON)


def _with(targets: dict[int, int], index: int, start: int) -> dict[int, int]:
    return {**targets, index: start}


def _steps(
    arrangement: _Arrangement, servers: Sequence[Placement], level: float
) -> Iterable[tuple[float, int, int]]:
    """All that could be done next: what would be lacking then, who moves, and to where."""
    lacking = [max(0.0, level - value) for value in arrangement.throughputs]
    in_all = sum(value * value for value in lacking)
    for index, server in enumerate(servers):
        if index in arrangement.targets:
            continue
        span, throughput, size = server.span, server.throughput, len(server.span)
        without = lacking[:]
        gone = in_all
        for block in span:
            value = max(0.0, level - arrangement.throughputs[block] + throughput)
            gone += value * value - without[block] * without[block]
            without[block] = value
        # What it would add to each block, summed up from the left: a span is a difference of two sums.
        gains = [
            value * value if value <= throughput else throughput * (2 * value - throughput)
            for value in without
        ]
        sums = list(accumulate(gains, initial=0.0))
        first, last = 0, len(without) - size
        if server.keeps is not None:
            first, last = max(first, server.keeps.end - size), min(last, server.keeps.start)
        for start in range(first, last + 1):
            if start != span.start and not start % server.start_step:
                yield gone - sums[start + size] + sums[start], index, start


def _in_order(
    targets: dict[int, int], servers: Sequence[Placement], throughputs: list[float]
) -> tuple[Move, ...] | None:
    """These moves in an order that never makes the worst block worse; None when there is none."""
    lowest = min(throughputs)
    waiting = [
        (servers[index], Span(start, start + len(servers[index].span))) for index, start in targets.items()
    ]
    moves: list[Move] = []
    while waiting:
        after = [moved(throughputs, server, target) for server, target in waiting]
        chosen = max(range(len(waiting)), key=lambda index: min(after[index]))
        if min(after[chosen]) < lowest:
            return None
        throughputs = after[chosen]
        server, target = waiting.pop(chosen)
        moves.append(Move(server.peer, target))
    return tuple(moves)


def _movers(servers: Iterable[Placement], throughputs: Sequence[float]) -> list[Placement]:
    """The servers that leave most behind where they go away, among those that may; `MAX_MOVERS` at most."""
    ranked = [
        (each.throughput - min(throughputs[each.span.start : each.span.end]), each.peer, each)
        for each in servers
        if each.keeps != each.span and len(each.span) < len(throughputs)
    ]
    return [each for _, _, each in nsmallest(MAX_MOVERS, ranked, key=itemgetter(0, 1))]

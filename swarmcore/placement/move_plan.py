"""Which moves would raise what a swarm can carry, and in which order they are to be made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import attrs

from swarmcore.placement.swarm_throughput import Placement, add, block_throughputs, mean_throughput
from swarmcore.types import PeerId, Span

ENOUGH = 0.99
"""Share of the upper bound above which no move is looked for."""

WORTH = 0.0025
"""Share of the upper bound that each move of a plan has to add, on average."""

HORIZON = 600.0
"""Seconds within which a move has to pay for itself: swarms do not stay as they are for much longer."""

MAX_STEPS = 12
"""Most steps that a plan looks ahead once no block is missing; the first ones made, servers plan again."""

MAX_MOVERS = 64
"""Servers that each step considers: those that are missed least where they are."""

MAX_FIRST = 40
"""Moves to the worst block for which a step looks for others, to mend what they leave behind."""

MAX_CHAIN = 3
"""Most moves in one step."""


@attrs.frozen
class Move:
    """A server goes to ``target``."""

    peer: PeerId
    target: Span


@attrs.frozen
class MovePlan:
    """Moves that help, step by step."""

    steps: tuple[tuple[Move, ...], ...]
    """Each raises the worst block by one move, or by two, of which the first makes room for the second. At no
    time is the worst block served worse than before. No server moves twice."""
    ready: frozenset[PeerId]
    """Servers that can move at once: no other one has to move before, lest the worst block gets worse."""
    throughput: float
    """Tokens per second through the block that is served worst, after all steps."""

    @property
    def moves(self) -> int:
        """How many there are in all."""
        return sum(map(len, self.steps))

    def move_of(self, peer: PeerId) -> Move | None:
        """Where ``peer`` goes, at once or later; None when it stays."""
        return next((move for step in self.steps for move in step if move.peer == peer), None)


@lru_cache(maxsize=8)
def plan_moves(placed: tuple[Placement, ...], blocks: int) -> MovePlan:
    """Moves that raise the throughput of the block that is served worst, as long as they are worth it.

    Equal arguments give the same plan, so that servers with the same view agree on who moves. In arXiv
    2312.08361, section 3.3, each server asks what would be best for it to do; here the one whose move helps
    most goes, and two go when one alone would not help.
    """
    throughputs = block_throughputs(placed, blocks)
    possible = mean_throughput(placed, blocks)
    waiting = {each.peer: each for each in placed}
    steps: list[tuple[Move, ...]] = []
    kept, reached, best = 0, min(throughputs), min(throughputs)
    moves = ahead = 0
    while ahead < MAX_STEPS and min(throughputs) < ENOUGH * possible:
        step = best_step(list(waiting.values()), throughputs, worth=WORTH * possible)
        if step is None:
            break
        for move in step:
            throughputs = moved(throughputs, waiting.pop(move.peer), move.target)
        steps.append(step)
        moves += len(step)
        ahead += min(throughputs) > 0
        if (value := min(throughputs) - WORTH * possible * moves) > best:
            kept, reached, best = len(steps), min(throughputs), value
    return MovePlan(tuple(steps[:kept]), _ready(steps[:kept], placed, blocks), reached)


def _ready(steps: Sequence[tuple[Move, ...]], placed: Sequence[Placement], blocks: int) -> frozenset[PeerId]:
    servers = {each.peer: each for each in placed}
    throughputs = block_throughputs(placed, blocks)
    return frozenset(
        move.peer
        for move, *_ in steps
        if min(moved(throughputs, servers[move.peer], move.target)) >= min(throughputs)
    )


def best_step(
    servers: Sequence[Placement],
    throughputs: list[float],
    *,
    worth: float = 0.0,
    movers: int = MAX_MOVERS,
    firsts: int = MAX_FIRST,
) -> tuple[Move, ...] | None:
    """The move of one of ``servers`` to the worst block that raises it most, or else the pair of moves.

    A pair is looked for where a single move does not add ``worth``, and has to add as much. None when nothing
    raises the worst block or, where several are equally bad, one of them. ``movers`` and ``firsts`` bound the
    effort, which grows with their product.
    """
    lowest = min(throughputs)
    candidates = _movers(servers, throughputs, movers)
    singles = sorted(
        _moves_to(throughputs.index(lowest), candidates, throughputs), key=lambda each: -each.value
    )
    if not singles:
        return None
    step: tuple[Move, ...] | None = None
    top = [each for each in singles if each.value == singles[0].value]
    single = max(top, key=lambda each: sorted(each.after))
    reached = lowest
    if single.value > lowest or (
        min(single.after) == lowest and not single.server.lost and sorted(single.after) > sorted(throughputs)
    ):
        step, reached = (Move(single.server.peer, single.target),), single.value
    if step is not None and reached >= lowest + worth:
        return step
    for first in singles[:firsts]:
        chain = [first]
        while len(chain) < MAX_CHAIN:
            after = chain[-1].after
            others = [each for each in candidates if all(each is not link.server for link in chain)]
            mending = _moves_to(after.index(min(after)), others, after, above=min(after))
            if not mending:
                break
            chain.append(max(mending, key=lambda each: each.value))
            value = min(chain[-1].after) - sum(link.server.lost for link in chain) / HORIZON
            if value > reached + worth and _harmless(chain, throughputs):
                step = tuple(Move(link.server.peer, link.target) for link in reversed(chain))
                reached = value
    return step


def _harmless(chain: Sequence[_Candidate], throughputs: list[float]) -> bool:
    """Whether the worst block gets no worse at any time when the last one goes first."""
    lowest, after = min(throughputs), throughputs
    for link in reversed(chain[1:]):
        after = moved(after, link.server, link.target)
        if min(after) < lowest:
            return False
    return True


def moved(throughputs: Sequence[float], server: Placement, target: Span) -> list[float]:
    """What ``throughputs``, which include ``server``, become when it goes to ``target``."""
    after = list(throughputs)
    add(after, server.span, -server.throughput)
    add(after, target, server.throughput)
    return after


@attrs.frozen
class _Candidate:
    server: Placement
    target: Span
    after: list[float]
    value: float
    """The throughput of the worst block afterwards, less what is lost by moving."""


def _movers(servers: Iterable[Placement], throughputs: Sequence[float], count: int) -> list[Placement]:
    """The ``count`` servers that leave most behind where they go away, among those that may."""
    ranked = [
        (each.throughput - min(throughputs[each.span.start : each.span.end]), each.peer, each)
        for each in servers
        if each.keeps != each.span and len(each.span) < len(throughputs)
    ]
    return [each for _, _, each in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _moves_to(
    block: int, servers: Iterable[Placement], throughputs: list[float], *, above: float = -1.0
) -> list[_Candidate]:
    """All moves of ``servers`` onto ``block`` after which the worst block has more than ``above``."""
    found: list[_Candidate] = []
    blocks = len(throughputs)
    for server in servers:
        if block in server.span:
            continue
        size = len(server.span)
        rest = list(throughputs)
        add(rest, server.span, -server.throughput)
        first, last = max(0, block - size + 1), min(block, blocks - size)
        if server.keeps is not None:
            first, last = max(first, server.keeps.end - size), min(last, server.keeps.start)
        # What no span around the block could mend is not tried.
        if (
            min(rest[:first], default=above + 1) <= above
            or min(rest[last + size :], default=above + 1) <= above
        ):
            continue
        for start in range(first, last + 1):
            after = list(rest)
            add(after, Span(start, start + size), server.throughput)
            if (lowest := min(after)) > above:
                found.append(
                    _Candidate(server, Span(start, start + size), after, lowest - server.lost / HORIZON)
                )
    return found

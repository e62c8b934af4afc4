"""How much a set of servers could carry at best: exactly for a few, by searching for many."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import attrs

from swarmcore.placement.move_plan import best_moves
from swarmcore.placement.swarm_throughput import Placement, block_throughputs, mean_throughput
from swarmcore.types import Span

MOST_ARRANGEMENTS = 200_000
"""Up to so many arrangements are all tried."""

KICKS = 20
"""How often a search sets out again, from its best arrangement with some servers elsewhere."""

KICKED = 0.2
"""The part of the servers that are elsewhere then."""

WIDTH = 4
"""Of `best_moves`, as `BRANCHES`: to set out more often finds more than to look at more at a time."""

BRANCHES = 4


def best_throughput(placed: Sequence[Placement], blocks: int, rng: random.Random) -> float:
    """Tokens per second through the worst block in the best arrangement of these servers.

    Exact when there are at most `MOST_ARRANGEMENTS`; else that of `good_arrangement`.
    """
    if not placed:
        return 0.0
    if arrangements(placed, blocks) <= MOST_ARRANGEMENTS:
        return _exhaustive(placed, blocks)
    return worst_block(good_arrangement(placed, blocks, rng), blocks)


def good_arrangement(placed: Sequence[Placement], blocks: int, rng: random.Random) -> list[Placement]:
    """The best arrangement that a search finds from where the servers are, and from `KICKS` random changes.

    Each time moves of several servers raise the worst block until none do.
    """
    possible = mean_throughput(placed, blocks)
    best = _raised(placed, blocks)
    for _ in range(KICKS):
        if worst_block(best, blocks) >= 0.995 * possible:
            break
        kicked = [
            attrs.evolve(each, span=_at(rng.randint(0, blocks - len(each.span)), each))
            if rng.random() < KICKED
            else each
            for each in best
        ]
        best = max(best, _raised(kicked, blocks), key=lambda found: worst_block(found, blocks))
    return best


def _raised(placed: Sequence[Placement], blocks: int) -> list[Placement]:
    servers = {each.peer: each for each in placed}
    while moves := best_moves(list(servers.values()), blocks, width=WIDTH, branches=BRANCHES):
        for move in moves:
            servers[move.peer] = attrs.evolve(servers[move.peer], span=move.target)
    return list(servers.values())


def arrangements(placed: Sequence[Placement], blocks: int) -> int:
    """In how many ways servers of these sizes can be placed."""
    ways = 1
    for each in placed:
        ways *= blocks - len(each.span) + 1
    return ways


def _exhaustive(placed: Sequence[Placement], blocks: int) -> float:
    # Large servers first: they have the fewest places, and the bound below bites sooner.
    order = sorted(placed, key=lambda each: (len(each.span), each.throughput), reverse=True)
    groups = [list(group) for _, group in groupby(order, key=lambda each: (len(each.span), each.throughput))]
    alike = [index > 0 for group in groups for index in range(len(group))]
    work_left = [0.0]
    for each in reversed(order):
        work_left.append(work_left[-1] + each.throughput * len(each.span))
    work_left.reverse()
    throughputs = [0.0] * blocks
    best = 0.0

    def place(index: int, first: int) -> None:
        nonlocal best
        if index == len(order):
            best = max(best, min(throughputs))
            return
        # What is left cannot lift all that is below the best so far.
        lacking = sum(best - value for value in throughputs if value < best)
        if lacking > work_left[index]:
            return
        each = order[index]
        size = len(each.span)
        for start in range(first if alike[index] else 0, blocks - size + 1):
            for block in range(start, start + size):
                throughputs[block] += each.throughput
            place(index + 1, start)
            for block in range(start, start + size):
                throughputs[block] -= each.throughput

    place(0, 0)
    return best


def worst_block(placed: Sequence[Placement], blocks: int) -> float:
    """Tokens per second through the worst block, as the servers are."""
    return min(block_throughputs(placed, blocks))


def _at(start: int, each: Placement) -> Span:
    return Span(start, start + len(each.span))

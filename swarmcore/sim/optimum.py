"""How much a set of servers could carry at best: exactly for a few, by searching for many."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import attrs

from swarmcore.placement.best_moves import best_moves
from swarmcore.placement.swarm_throughput import Placement, block_throughputs, mean_throughput
from swarmcore.types import Span

MOST_ARRANGEMENTS = 200_000
"""Up to so many arrangements are all tried."""

RESTARTS = 12
"""Arrangements drawn at random from which a search sets out."""


def best_throughput(placed: Sequence[Placement], blocks: int, rng: random.Random) -> float:
    """Tokens per second through the worst block in the best arrangement of these servers.

    Exact when there are at most `MOST_ARRANGEMENTS`; else the best of what a search finds from where the
    servers are and from `RESTARTS` random arrangements. Never above what an even share would give.
    """
    if not placed:
        return 0.0
    if arrangements(placed, blocks) <= MOST_ARRANGEMENTS:
        return _exhaustive(placed, blocks)
    possible = mean_throughput(placed, blocks)
    best = best_moves(placed, blocks).throughput
    for _ in range(RESTARTS):
        if best >= 0.999 * possible:
            break
        drawn = [
            attrs.evolve(each, span=_at(rng.randint(0, blocks - len(each.span)), each)) for each in placed
        ]
        best = max(best, best_moves(drawn, blocks).throughput)
    return best


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

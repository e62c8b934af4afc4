from __future__ import annotations

import itertools
import random

from swarmcore.placement.swarm_throughput import Placement
from swarmcore.sim.optimum import arrangements, best_throughput, worst_block
from swarmcore.types import PeerId, Span


def servers(sizes: list[tuple[int, float]]) -> list[Placement]:
    return [Placement(PeerId(f"p{i}"), Span(0, size), speed) for i, (size, speed) in enumerate(sizes)]


def by_brute_force(placed: list[Placement], blocks: int) -> float:
    choices = [
        [
            Placement(each.peer, Span(s, s + len(each.span)), each.throughput)
            for s in range(blocks - len(each.span) + 1)
        ]
        for each in placed
    ]
    return max(worst_block(arrangement, blocks) for arrangement in itertools.product(*choices))


def test_small_cases_are_exact() -> None:
    rng = random.Random(1)
    for _ in range(25):
        blocks = rng.randint(3, 6)
        placed = servers(
            [(rng.randint(1, blocks), rng.choice([1.0, 1.0, 2.0, 3.5])) for _ in range(rng.randint(1, 4))]
        )
        assert best_throughput(placed, blocks, rng) == by_brute_force(placed, blocks)


def test_large_cases_come_close_to_an_even_share() -> None:
    rng = random.Random(2)
    placed = servers([(rng.randint(3, 10), rng.choice([0.5, 1.0, 2.0])) for _ in range(60)])
    assert arrangements(placed, 30) > 10**9
    even = sum(each.throughput * len(each.span) for each in placed) / 30
    assert 0.9 * even < best_throughput(placed, 30, rng) <= even


def test_nobody_carries_nothing() -> None:
    assert best_throughput([], 8, random.Random(0)) == 0.0

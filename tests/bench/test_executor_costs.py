"""Costs fitted to measured times are those that the times were made of, and never negative."""

from __future__ import annotations

import random

import attrs
import pytest

from swarmcore.sim.costs import BatchLoad, CostModel, Measurement

pytest.importorskip("torch")

from swarmcore.bench.executor_costs import fit

COSTS = CostModel(
    call=0.002,
    block=0.02,
    decode_row=0.0,
    decode_attended=6e-6,
    prefill_row=8e-4,
    prefill_attended=2e-7,
)
LOADS = [
    *(BatchLoad(decode_rows=rows, decode_attended=rows * cached) for rows in (1, 16) for cached in (0, 512)),
    *(
        BatchLoad(prefill_rows=rows, prefill_attended=rows * cached)
        for rows in (64, 512)
        for cached in (0, 512)
    ),
]


def measured(*blocks: int, noise: float = 0.0) -> list[Measurement]:
    chance = random.Random(1)
    return [
        Measurement(blocks=held, load=load, seconds=seconds(held, load) * (1 + noise * chance.random()))
        for held in blocks
        for load in LOADS
    ]


def seconds(blocks: int, load: BatchLoad) -> float:
    rows = COSTS.decode_row * load.decode_rows + COSTS.prefill_row * load.prefill_rows
    cache = COSTS.decode_attended * load.decode_attended + COSTS.prefill_attended * load.prefill_attended
    return COSTS.call + blocks * (COSTS.block + rows + cache)


def test_costs_are_found_again() -> None:
    costs, error = fit(measured(1, 3))
    assert attrs.asdict(costs) == pytest.approx(attrs.asdict(COSTS), rel=1e-3, abs=1e-9)
    assert error < 1e-6


def test_no_cost_is_negative_and_what_cannot_be_told_apart_does_no_harm() -> None:
    """With one number of blocks, the cost of a call and that of a block are one."""
    costs, error = fit(measured(3, noise=0.2))
    assert min(attrs.astuple(costs)) >= 0
    assert error < 0.1
    assert costs.call + 3 * costs.block == pytest.approx(0.062, rel=0.25)

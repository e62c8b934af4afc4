"""Three ways to balance a small swarm, against the best of all arrangements."""

from __future__ import annotations

import pytest

from swarmcore.sim.balance import Balance
from swarmcore.sim.scenario import Report

SMALL = Balance(
    costs="bloom-7b1-paper",
    servers=4,
    blocks=(12, 20),
    speeds=(1.0, 2.0),
    seconds=900,
    lifetime=600.0,
    away=20.0,
    rebalance=30.0,
)


@pytest.fixture(scope="module")
def report() -> Report:
    return SMALL.simulate(2, lambda what, done, total: None)


def test_nothing_goes_wrong_and_the_best_is_exact(report: Report) -> None:
    assert report.problems == []
    assert report.data["exact"]


def test_nobody_beats_the_best_and_balancing_helps(report: Report) -> None:
    parts = {arm: report.data[arm]["part"] for arm in ("none", "new", "full")}
    assert all(0 <= part <= 1 for part in parts.values())
    assert parts["none"] < parts["full"]


def test_only_full_balancing_moves_servers(report: Report) -> None:
    assert report.data["none"]["moves"] == report.data["new"]["moves"] == 0

"""A small swarm through a minute, a third of it dead at once."""

from __future__ import annotations

import pytest

from swarmcore.sim.hosts import Geography
from swarmcore.sim.load import Load
from swarmcore.sim.scenario import Report

SMALL = Load(
    costs="bloom-7b1-paper",
    network=Geography(floor=2.0, width=80.0, regions=3, megabits=(100.0, 1000.0)),
    servers=20,
    clients=4,
    bootstraps=2,
    seconds=60,
    requests=0.5,
    restarts=2,
    restart_seconds=10.0,
    rush=1.0,
    tokens=40,
)


def ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def report() -> Report:
    return SMALL.simulate(2, ignore)


def test_every_generation_comes_to_its_end(report: Report) -> None:
    assert report.problems == []
    assert report.goals == {
        "no session gave up while every block had a holder": True,
        "the dead were gone from every view within 5 s": True,
    }
    assert report.data["finished"] >= 4


def test_servers_were_lost_in_the_middle_and_the_tokens_went_on(report: Report) -> None:
    assert report.data["killed"] >= 6
    assert report.data["recoveries"]
    assert max(recovery["seconds"] for recovery in report.data["recoveries"]) < 15.0


def test_the_dead_leave_all_views_within_seconds(report: Report) -> None:
    assert report.data["never_clean"] == 0
    assert max(report.data["clean_after"]["clients"]) < 5.0
    assert max(report.data["clean_after"]["servers"]) < 5.0


def test_it_repeats_itself(report: Report) -> None:
    assert SMALL.simulate(2, ignore).trace == report.trace

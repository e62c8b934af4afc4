"""Training in a small simulated swarm: shared by speed, near the bound, nothing lost; codecs by link."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest

from swarmcore.errors import InputError
from swarmcore.sim.costs import load_costs
from swarmcore.sim.hosts import Geography
from swarmcore.sim.kinds import KINDS
from swarmcore.sim.link_times import link_times
from swarmcore.sim.model import SimModel, batch_numbers
from swarmcore.sim.scenario import Report, load_scenario
from swarmcore.sim.trainer import MicroBatches, TrainingServer, TrainingSwarm
from swarmcore.sim.training import Training
from swarmcore.sim.training_links import LinkRun
from swarmcore.sim.training_run import Holder, TrainingRun
from swarmcore.sim.world import World
from swarmcore.types import Span

SCENARIO = Path(__file__).with_name("small_training.toml")


@pytest.fixture(scope="module")
def scenario() -> Training:
    loaded = load_scenario(str(SCENARIO), KINDS)
    assert isinstance(loaded, Training)
    return loaded


@pytest.fixture(scope="module")
def report(scenario: Training) -> Report:
    return scenario.simulate(2, lambda what, done, total: None)


def run(report: Report, name: str) -> dict[str, Any]:
    [found] = [each for each in report.data["runs"] if each["name"] == name]
    return dict(found)


def test_all_goals_are_reached(report: Report) -> None:
    assert report.problems == []
    assert set(report.goals.values()) == {True}
    assert run(report, "steady")["off"] < 0.05
    assert 0.9 < run(report, "steady")["part"] <= 1.01
    assert report.data["two_chains"] > 1.6


def test_nothing_is_lost_when_servers_die_and_come(report: Report) -> None:
    churn = run(report, "churn")
    assert churn["deaths"] > 3 and churn["redone"] > 0
    assert (churn["lost"], churn["doubled"], churn["micro_batches"]) == (0, 0, 120)
    assert 0 < churn["extra"] < 0.1
    assert churn["part"] > 0.7


def test_the_same_seed_is_the_same_run(scenario: Training, report: Report) -> None:
    [churn] = [arm for arm in scenario.arms if arm.churn]
    again = TrainingRun(scenario, 2, churn).result()
    before = run(report, "churn")
    assert (again.trace, again.messages, again.redone) == (
        before["trace"],
        before["messages"],
        before["redone"],
    )
    assert TrainingRun(scenario, 3, attrs.evolve(churn, micro_batches=10)).result().trace != again.trace


def test_a_block_that_ran_twice_or_with_wrong_inputs_shows() -> None:
    model = SimModel("counted", 12)
    first, second = Span(0, 5), Span(5, 12)
    rows = model.batch(7, 3)
    inner = model.forward(rows, first)
    gradients = model.backward(model.batch(7, 3), inner, second)
    assert batch_numbers(model.backward(gradients, rows, first)) == model.gradient(7)
    assert batch_numbers(model.backward(gradients, inner, first)) != model.gradient(7)
    assert batch_numbers(model.backward(gradients, rows, second)) != model.gradient(7)
    assert batch_numbers(model.backward(model.batch(7, 3), rows, Span(0, 12))) == model.gradient(7)


def test_the_bound_is_that_of_the_worst_block() -> None:
    costs, work = load_costs("bloom-7b1-paper"), MicroBatches((100,))
    world = World(1, Geography(), costs)
    spans = [("0:20", 1.0), ("20:30", 4.0), ("10:20", 2.0)]
    servers = [TrainingServer(world, s, Span.parse(s), speed=speed) for s, speed in spans]
    assert TrainingSwarm(world, servers).bound(work) == pytest.approx(servers[0].rate(work))
    assert servers[0].rate(work) == pytest.approx(1 / (4 * costs.costs.seconds(20, work.load)))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"stages": 0}, "1 or more"),
        ({"stages": 31}, "31 stages cannot share 30 blocks"),
        ({"speeds": ()}, "above 0"),
        ({"speeds": (1.0, math.inf)}, "above 0"),
        ({"links": (math.nan,)}, "above 0"),
        ({"churn": -1.0}, "churn"),
        ({"overlapping": (Holder(span="0:30", speed=0.0),)}, "above 0"),
        ({"overlapping": (Holder(span="0:9"), Holder(span="10:30"))}, "hold blocks 0:30 together"),
        ({"overlapping": (Holder(span="0:31"),)}, "and no others"),
    ],
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Training(costs="bloom-7b1-paper", **wrong)


@pytest.mark.parametrize(("mbits", "codec"), [(10.0, "raw"), (10.0, "mixed2"), (10.0, "auto")])
def test_a_link_takes_what_is_calculated(mbits: float, codec: str) -> None:
    found = LinkRun("bloom-7b1-paper", 1, mbits, codec, 1, row_bytes=512).result()
    [line] = link_times((mbits,))
    calculated = {"raw": line.raw, "mixed2": line.fixed, "auto": line.auto}[codec]
    assert found.seconds == pytest.approx(calculated, rel=0.02)

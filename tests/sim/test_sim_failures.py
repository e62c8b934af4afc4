"""A small table of failure rates, by the command line and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarmcore.cli import main
from swarmcore.sim.failures import FailureTable
from swarmcore.sim.kinds import KINDS
from swarmcore.sim.scenario import Report, load_scenario

SCENARIO = Path(__file__).with_name("small_failures.toml")


def ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def report() -> Report:
    return load_scenario(str(SCENARIO), KINDS).simulate(3, ignore)


def cell(report: Report, algorithm: str, probability: float) -> dict[str, float]:
    [found] = [
        c for c in report.data["cells"] if (c["algorithm"], c["probability"]) == (algorithm, probability)
    ]
    return found


def test_sessions_outlive_their_servers_and_no_token_is_wrong(report: Report) -> None:
    assert report.problems == []
    for algorithm in ("client", "servers"):
        failing = cell(report, algorithm, 0.05)
        assert failing["failures"] > 0
        assert len(failing["failovers"]) > 0
        assert failing["steps_per_second"] > 0


def test_a_journal_costs_next_to_nothing_and_failures_cost_restarts_dear(report: Report) -> None:
    assert (
        cell(report, "client", 0.0)["steps_per_second"]
        > 0.95 * cell(report, "restarts", 0.0)["steps_per_second"]
    )
    assert (
        cell(report, "client", 0.05)["steps_per_second"]
        > 1.2 * cell(report, "restarts", 0.05)["steps_per_second"]
    )
    assert (
        cell(report, "cacheless", 0.0)["steps_per_second"]
        < 0.8 * cell(report, "client", 0.0)["steps_per_second"]
    )


def test_another_seed_is_another_run(report: Report) -> None:
    scenario = load_scenario(str(SCENARIO), KINDS)
    assert isinstance(scenario, FailureTable)
    assert scenario.simulate(4, ignore).trace != report.trace


def test_the_same_seed_is_the_same_run_whatever_strings_hash_to(report: Report) -> None:
    for hash_seed in ("1", "77"):
        done = subprocess.run(
            [sys.executable, "-m", "swarmcore", "sim", str(SCENARIO), "--seed", "3", "--json"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        event = json.loads(done.stdout.splitlines()[-1])
        assert event["event"] == "simulation"
        assert (event["trace"], event["messages"]) == (report.trace, report.messages)


def test_people_see_the_papers_figures_and_which_of_them_are_unconfirmed(tmp_path: Path) -> None:
    scenario = tmp_path / "paper.toml"
    text = (
        SCENARIO.read_text()
        .replace("[24]", "[128]")
        .replace("0.05]", "0.01]")
        .replace("runs = 2", "runs = 1")
    )
    scenario.write_text(text.replace("stages", 'algorithms = ["client"]\nstages'))
    done = CliRunner().invoke(main, ["sim", str(scenario)], catch_exceptions=False, terminal_width=200)
    assert done.exit_code == 0
    assert "3.38 unconfirmed" in done.stdout
    assert "this system" in done.stdout
    assert "trace " in done.stdout

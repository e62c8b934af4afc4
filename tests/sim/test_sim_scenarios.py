from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarmcore.cli import main
from swarmcore.errors import InputError
from swarmcore.sim.costs import BatchLoad, cost_names, load_costs
from swarmcore.sim.kinds import KINDS
from swarmcore.sim.load import Load
from swarmcore.sim.plot import save_plot
from swarmcore.sim.scenario import Report, Scenario, load_scenario, parse_scenario, scenario_names


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_that_comes_along_is_sound(name: str) -> None:
    scenario = load_scenario(name, KINDS)
    assert scenario.title
    assert load_costs(scenario.costs).blocks > 0


@pytest.mark.parametrize("name", cost_names())
def test_every_measurement_says_where_it_is_from(name: str) -> None:
    measured = load_costs(name)
    assert measured.machine and measured.command
    one, many = BatchLoad(decode_rows=1), BatchLoad(decode_rows=16)
    assert 0 < measured.costs.seconds(1, one) <= measured.costs.seconds(1, many)
    assert measured.costs.seconds(1, many) < 16 * measured.costs.seconds(1, one)
    for line in measured.measured:
        assert measured.costs.seconds(line.blocks, line.load) == pytest.approx(line.seconds, rel=1.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kind = ", "not TOML"),
        ("kind = 'tornado'", "'tornado' is none of"),
        ("kind = 'failures'\nstagse = 4", "unknown key 'stagse'"),
        ("kind = 'failures'\n[network]\nwith = 4", r"unknown key 'network\.with'"),
        ("kind = 'failures'\nstages = 'four'", "Expected `int`"),
        ("kind = 'failures'\nstages = 0", "1 or more"),
        ("kind = 'failures'\nprobabilities = [2.0]", "below 1"),
        ("kind = 'failures'\n[network]\nmegabits = []", "megabits"),
    ],
)
def test_a_bad_scenario_is_refused_with_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=reason):
        load_scenario(str(file), KINDS)
    done = CliRunner().invoke(main, ["sim", str(file)])
    assert done.exit_code == 2
    assert str(file) in done.stderr


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match="failures-paper"):
        load_scenario("failurse", KINDS)


class Doomed(Scenario):
    kind = "doomed"

    def simulate(self, seed: int, progress: object) -> Report:
        return Report(trace="0" * 32, messages=0, problems=["a session gave up"])


def test_a_run_that_fails_says_how_to_run_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmcore.sim.kinds.KINDS", (Doomed,))
    file = tmp_path / "doomed run.toml"
    file.write_text("kind = 'doomed'")
    done = CliRunner().invoke(main, ["sim", str(file), "--seed", "7"])
    assert done.exit_code == 1
    assert "problem: a session gave up" in done.stderr
    assert f"again with: swarmcore sim '{file}' --seed 7" in done.stderr


def test_scenarios_parse_from_data_alone() -> None:
    scenario = parse_scenario({"kind": "failures", "tokens": [7]}, KINDS, "here")
    assert getattr(scenario, "tokens") == (7,)  # noqa: B009


def test_keys_of_before_are_still_read() -> None:
    scenario = parse_scenario({"kind": "crowd", "disaster": 0.25, "disaster_at": 0.75}, KINDS, "here")
    assert isinstance(scenario, Load)
    assert (scenario.mass_failure, scenario.mass_failure_at) == (0.25, 0.75)


def test_a_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = CliRunner().invoke(main, ["sim", "failures", "--plot", str(tmp_path / "out.png")])
    assert done.exit_code == 2
    assert "swarmcore-llm[sim]" in done.stderr


def test_a_plot_that_cannot_be_written_is_refused_before_the_run() -> None:
    done = CliRunner().invoke(main, ["sim", "failures", "--plot", "out.gif"])
    assert done.exit_code == 2
    assert ".png" in done.stderr


def test_a_plot_is_the_same_file_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for file in files:
        save_plot(lambda figure: figure.add_subplot().plot([1, 2], [3, 4], label="line"), str(file))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<svg" in files[0].read_bytes()

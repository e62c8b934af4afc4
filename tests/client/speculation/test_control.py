"""What is drafted, and how many steps are under way: on made-up chains it is close to the best there is."""

from __future__ import annotations

import itertools

import pytest
from speculating_client import World, tokens_a_second

from swarmcore.client.speculation.control import Plan, SpeculationController, StepTimes
from swarmcore.client.speculation.speculator import Speculator
from swarmcore.errors import InputError
from swarmcore.generation_settings import Speculation

FIXED = [
    Speculation(length=length, depth=depth) for length in (1, 2, 4, 8, 16, 32) for depth in (1, 2, 3, 4, 8)
]
ROUND_TRIPS = (0.0, 0.05, 0.2)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("stages", [1, 3])
def test_it_is_close_to_the_best_fixed_setting_and_never_below_plain(acceptance: float, stages: int) -> None:
    shares = []
    for round_trip, stage_seconds in itertools.product(ROUND_TRIPS, (0.005, 0.03)):
        world = World(acceptance, round_trip, stages, stage_seconds)
        plain, auto = tokens_a_second(world, None), tokens_a_second(world, Speculation())
        best = max(plain, *(tokens_a_second(world, fixed) for fixed in FIXED))
        assert auto >= 0.97 * plain, world
        shares.append(auto / best)
        assert shares[-1] > 0.75, world
    assert sorted(shares)[len(shares) // 2] > 0.88


@pytest.mark.parametrize("acceptance", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("growth", [0.3, 0.9])
def test_it_is_close_to_the_best_where_rows_are_dear(acceptance: float, growth: float) -> None:
    """As with quantised weights on some processors, where eight rows take as long as seven of one each."""
    for stage_seconds in (0.01, 0.03):
        world = World(acceptance, 0.12, stage_seconds=stage_seconds, growth=growth)
        best = max(tokens_a_second(world, fixed) for fixed in FIXED)
        assert tokens_a_second(world, Speculation()) > 0.8 * best, world


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
def test_drafters_that_promise_too_much_cost_little(acceptance: float, round_trip: float) -> None:
    world = World(acceptance, round_trip, stated=0.5)
    assert tokens_a_second(world, Speculation()) >= 0.85 * tokens_a_second(world, None)


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    controller = SpeculationController(Speculation())
    assert not controller.ready
    assert controller.lengths([[0.9] * 8]) == [0]
    controller.measured(1, 0.1)
    assert controller.ready
    assert controller.lengths([[0.9] * 8]) == [8]


def test_what_a_step_takes_stays_known_while_only_others_are_measured() -> None:
    times = StepTimes()
    for _ in range(3):
        times.measured(1, 0.2)
    for _ in range(200):
        times.measured(4, 0.2 + 3 * 0.08)
    assert times.of(1) == pytest.approx(0.2)
    assert times.growth == pytest.approx(0.08, rel=0.01)
    for _ in range(200):
        times.measured(1, 0.1)
    assert times.of(1) == pytest.approx(0.1, rel=0.01)
    assert times.growth == pytest.approx(0.08, rel=0.01)


def test_a_step_behind_one_that_was_called_back_is_not_taken_at_its_word() -> None:
    controller = SpeculationController(Speculation())
    for rows in (1, 4, 8) * 20:
        controller.measured(rows, 0.1 + 0.01 * (rows - 1))
    before = controller.times.of(8)
    for _ in range(3):
        controller.recalled()
        controller.measured(8, 0.5)
    assert before <= controller.times.of(8) < 1.1 * before
    controller.measured(8, 0.5)
    assert controller.times.of(8) > 1.1 * before


@pytest.mark.parametrize("factor", [0.3, 0.5, 2.0, 20.0])
def test_what_an_earlier_generation_measured_is_where_the_next_begins(factor: float) -> None:
    before = SpeculationController(Speculation(), stages=3)
    for rows in (1, 4, 8) * 20:
        before.measured(rows, 0.1 + 0.003 * (rows - 1))
    controller = SpeculationController(Speculation(), stages=3, before=before)
    assert controller.ready
    assert controller.times.of(5) == pytest.approx(before.times.of(5))
    assert controller.lengths([[0.9] * 8]) == before.lengths([[0.9] * 8])
    for rows in (1, 4, 8) * 5:
        controller.measured(rows, factor * (0.1 + 0.003 * (rows - 1)))
    assert controller.times.of(5) == pytest.approx(factor * before.times.of(5), rel=0.25)
    assert not SpeculationController(Speculation(), stages=2, before=before).ready, "of another chain"


def test_rows_that_cost_as_much_as_steps_are_not_worth_it() -> None:
    controller = SpeculationController(Speculation())
    for rows in (1, 4, 8) * 20:
        controller.measured(rows, 0.01 * rows)
    assert controller.times.growth == pytest.approx(0.01, rel=0.2)
    assert controller.lengths([[0.7] * 8]) == [0]


def test_where_many_share_a_batch_rows_are_counted_as_if_all_sent_as_many() -> None:
    controller = SpeculationController(Speculation())
    for rows in (1, 4, 8) * 20:
        controller.measured(rows, 0.1 + 0.003 * (rows - 1))
    assert sum(controller.lengths([[0.6] * 8])) > 0
    controller.sharing = 40
    assert controller.lengths([[0.6] * 8]) == [0]


def test_texts_of_a_batch_get_as_many_drafts_as_each_is_worth() -> None:
    controller = SpeculationController(Speculation())
    controller.measured(1, 0.1)
    likely, unlikely, none = controller.lengths([[0.95] * 6, [0.3, 0.1, 0.1], []])
    assert likely == 6
    assert unlikely <= 1
    assert none == 0


def test_a_failover_is_not_what_steps_take() -> None:
    times = StepTimes()
    for _ in range(50):
        times.measured(1, 0.01)
    times.measured(1, 30.0)
    assert times.first < 0.02


def test_a_fixed_setting_is_kept_to() -> None:
    controller = SpeculationController(Speculation(length=3, depth=2))
    controller.max_in_flight = 8
    assert controller.plan([0.01] * 5) == Plan(3, 2)
    assert controller.behind([0.01] * 5, 0.01, 3) == 3
    controller.max_in_flight = 1
    assert controller.plan([0.01] * 5).depth == 1


@pytest.mark.parametrize(
    "settings",
    [{"length": 40}, {"length": -1}, {"depth": 0}, {"depth": 9}, {"max_tokens": 64}, {"depth": True}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"Speculation: {next(iter(settings))} must be from"):
        Speculation(**settings)


def test_generations_that_run_at_once_share_batches() -> None:
    speculator = Speculator(100)
    with speculator.deciding(Speculation(), stages=2) as one:
        assert one.sharing == 1
        with speculator.deciding(Speculation(), stages=2) as other:
            assert one.sharing == other.sharing == 2
        assert one.sharing == 1
    speculator.close()

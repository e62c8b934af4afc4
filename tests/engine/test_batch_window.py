"""When a batch waits for decode steps that are about to come."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from swarmcore.engine.batch_window import NEARLY, ON_TIME, BatchWindow, PassTimes
from swarmcore.engine.engine import Engine
from swarmcore.testing.executor import CountingExecutor, hidden_states
from swarmcore.wire.tensors import Tensor


def a_window(*, each: float = 0.0) -> BatchWindow:
    """Of passes that take a second, and ``each`` more for each step."""
    window = BatchWindow()
    for steps in (1, 2) * 50:
        window.passes.note(steps, 1.0 + each * steps)
    return window


def seen(window: BatchWindow, session: str, away: float, answered: float, group: str | None = None) -> None:
    """Let the session have returned after ``away`` seconds often, and have its latest answer."""
    for turn in range(30, 0, -1):
        window.answered(session, answered - away * turn)
        window.arrived(session, answered - away * (turn - 1), group)
    window.answered(session, answered)


def test_a_session_that_decodes_alone_is_never_made_to_wait():
    window = a_window()
    seen(window, "one", 0.1, 10.0)
    window.arrived("one", 10.1)
    assert window.wait(1, 10.1, 10.1) is None


def test_a_session_that_is_about_to_come_is_waited_for():
    window = a_window()
    seen(window, "other", 0.5, 10.0)
    wait = window.wait(1, 10.2, 10.2)
    assert wait is not None
    assert wait.steps == 2
    assert wait.until == pytest.approx(10.5 + ON_TIME, abs=0.01)


def test_one_that_would_come_after_a_pass_is_not():
    window = a_window()
    seen(window, "other", 1.5, 10.0)
    assert window.wait(1, 10.2, 10.2) is None
    assert window.wait(1, 10.9, 10.9) is not None


def test_the_many_are_not_kept_waiting_for_the_few():
    window = a_window()
    seen(window, "other", 0.5, 10.0)
    assert window.wait(1, 10.1, 10.1) is not None
    assert window.wait(20, 10.1, 10.1) is None
    for number in range(10):
        seen(window, f"another {number}", 0.5, 10.0)
    assert window.wait(20, 10.1, 10.1) is not None


def test_one_that_has_not_come_in_time_is_given_up():
    window = a_window()
    seen(window, "other", 0.8, 10.0)
    wait = window.wait(1, 10.7, 10.7)
    assert wait is not None
    assert window.wait(1, 10.7, wait.until) is None


def test_none_waits_longer_than_a_pass_that_has_nobody_in_it():
    window = a_window()
    for number in range(20):
        seen(window, f"other {number}", 0.1 * number, 10.0)
    wait = window.wait(1, 10.0, 10.0)
    assert wait is not None
    assert wait.until <= 11.0
    assert window.wait(5, 10.0, 11.0) is None


def test_closed_sessions_and_those_without_a_rhythm_are_not_waited_for():
    window = a_window()
    seen(window, "other", 0.5, 10.0)
    window.closed("other")
    window.arrived("new", 10.0)
    window.answered("new", 10.1)
    assert window.wait(1, 10.2, 10.2) is None


def test_one_that_comes_when_it_likes_is_not_waited_for():
    window = a_window()
    at = 0.0
    for away in (1.0, 9.0) * 10:
        window.answered("fickle", at)
        window.arrived("fickle", at := at + away)
    window.answered("fickle", at)
    window.arrived("other", at + 2.0)
    assert window.wait(1, at + 4.5, at + 4.5) is None


def test_one_long_absence_is_soon_forgotten():
    window = a_window()
    seen(window, "other", 0.1, 10.0)
    window.arrived("other", 500.0)
    window.answered("other", 500.1)
    wait = window.wait(1, 500.15, 500.15)
    assert wait is not None
    assert wait.until < 500.5


def test_sessions_of_other_blocks_are_not_waited_for():
    window = a_window()
    seen(window, "other", 0.5, 10.0, "blocks 0:6")
    assert window.wait(1, 10.2, 10.2, "blocks 0:12") is None
    assert window.wait(1, 10.2, 10.2, "blocks 0:6") is not None


def test_those_who_are_away_for_longer_than_a_pass_take_turns():
    window = a_window(each=0.2)
    for number in range(4):
        seen(window, f"other {number}", 1.4, 10.0)
    # Two groups keep this stage at work while each is elsewhere for a pass.
    wait = window.wait(1, 10.9, 10.9)
    assert wait is not None
    assert wait.steps == 3
    for number in range(2):
        window.arrived(f"other {number}", 11.0)
    assert window.wait(3, 10.9, 11.0) is None


def test_one_group_does_where_more_would_gain_next_to_nothing():
    window = a_window()
    away = 1 - NEARLY
    for number in range(4):
        seen(window, f"other {number}", away / 2, 10.0)
    wait = window.wait(1, 10.0, 10.0)
    assert wait is not None
    assert wait.steps == 5


def test_what_comes_in_a_burst_is_waited_for_until_it_ends():
    window = BatchWindow(turns=False)
    for turn in range(20):
        window.passes.note(1, 1.0)
        for number, session in enumerate("abc"):
            window.arrived(session, 30.0 * turn + 0.02 * number)
            window.answered(session, 30.0 * turn + 1.0)
    window.arrived("a", 590.0)  # long before its time, and nobody else is expected yet
    wait = window.wait(1, 590.0, 590.0)
    assert wait is not None
    assert 590.02 < wait.until < 590.1
    assert wait.steps == 3
    window.arrived("b", 590.02)
    assert window.wait(2, 590.0, 590.03) is not None
    assert window.wait(2, 590.0, 590.1) is None


class TestPassTimes:
    def test_the_fixed_part_and_that_of_each_step_are_told_apart(self):
        times = PassTimes()
        for steps in (1, 4, 2, 8) * 10:
            times.note(steps, 0.5 + 0.1 * steps)
        assert times.fixed == pytest.approx(0.5, rel=0.02)
        assert times.each == pytest.approx(0.1, rel=0.02)

    def test_passes_of_one_size_are_taken_to_be_mostly_fixed(self):
        times = PassTimes()
        for _ in range(50):
            times.note(4, 1.0)
        assert 0.8 < times.fixed < 1.0
        assert times.fixed + 4 * times.each == pytest.approx(1.0)

    def test_one_that_took_long_counts_for_little(self):
        times = PassTimes()
        for _ in range(50):
            times.note(1, 1.0)
        times.note(1, 600.0)
        assert times.fixed + times.each < 1.1

    def test_it_follows_a_machine_that_has_become_slow(self):
        times = PassTimes()
        for seconds in (1.0, 3.0):
            for _ in range(60):
                times.note(2, seconds)
        assert times.fixed + 2 * times.each == pytest.approx(3.0, rel=0.1)


class SlowExecutor(CountingExecutor):
    """A pass takes a second, however many tokens it has."""

    async def step(self, batch):
        await asyncio.sleep(1.0)
        return await super().step(batch)


@pytest.mark.virtual_time
async def test_sessions_that_come_one_after_the_other_share_their_passes():
    executor = SlowExecutor()
    engine = Engine(executor, cache_tokens=4096)
    await engine.start()

    async def decode(name: str, delay: float) -> None:
        await engine.open(name, 1, 0, timeout=1)
        for position in range(20):
            await engine.step(name, [position], [1], hidden_states([[0.5] * 4]), timeout=60)
            await asyncio.sleep(delay)

    await asyncio.gather(*(decode(f"session {n}", 0.1 + 0.02 * n) for n in range(8)))
    # Two groups at the start: the first to come, and all who came during its pass.
    assert len(executor.batches) <= 24
    assert sum(map(sum, executor.batches)) == 160
    assert engine.stats.decode_batches == len(executor.batches)
    assert engine.stats.decode_tokens == 160
    assert 0 < engine.stats.batch_waits <= len(executor.batches)
    await engine.close()


@pytest.mark.virtual_time
async def test_a_session_with_several_steps_under_way_does_not_wait_for_itself():
    executor = SlowExecutor()
    engine = Engine(executor, cache_tokens=4096)
    await engine.start()
    await engine.open("one", 1, 0, timeout=1)
    under_way: deque[asyncio.Future[Tensor]] = deque()
    for position in range(30):
        rows = hidden_states([[0.5] * 4] * 3)
        under_way.append(engine.step("one", [3 * position], [3], rows, timeout=60))
        if len(under_way) == 3:
            await under_way.popleft()
    await asyncio.gather(*under_way)
    assert engine.stats.decode_batches == 30 - 1, "all but what begins the session"
    assert not engine.stats.batch_waits
    await engine.close()

"""When a batch waits for decode steps that are about to come."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.engine.batch_window import FIXED, LATE, BatchWindow
from swarmcore.engine.engine import Engine
from swarmcore.testing.executor import CountingExecutor, hidden_states

PASS = 1.0 / FIXED
"""A pass whose fixed part takes a second."""


def seen(window: BatchWindow, session: str, returns: float, answered: float) -> None:
    """Let the session have returned once after ``returns`` seconds, and have its latest answer."""
    window.arrived(session, answered - returns - 1)
    window.answered(session, answered - returns)
    window.arrived(session, answered)
    window.answered(session, answered)


def test_a_session_that_decodes_alone_is_never_made_to_wait():
    window = BatchWindow()
    seen(window, "one", 0.1, 10.0)
    window.arrived("one", 10.1)
    assert window.wait(1, PASS, 10.1) is None


def test_a_session_that_is_about_to_come_is_waited_for():
    window = BatchWindow()
    seen(window, "other", 0.5, 10.0)
    wait = window.wait(1, PASS, 10.2)
    assert wait is not None
    assert wait.steps == 2
    assert wait.until == pytest.approx(10.5 + 0.1)


def test_one_that_would_come_after_much_of_a_pass_is_not():
    window = BatchWindow()
    seen(window, "other", 0.5, 10.0)
    assert window.wait(1, PASS, 9.9) is None


def test_the_many_are_not_kept_waiting_for_the_few():
    window = BatchWindow()
    seen(window, "other", 0.5, 10.0)
    assert window.wait(1, PASS, 10.2) is not None
    assert window.wait(3, PASS, 10.2) is None
    seen(window, "another", 0.5, 10.0)
    assert window.wait(3, PASS, 10.2) is not None


def test_one_that_has_not_come_in_time_is_given_up():
    window = BatchWindow()
    seen(window, "other", 1.0, 10.0)
    assert window.wait(1, PASS, 11.1) is not None
    assert window.wait(1, PASS, 10.0 + LATE + 0.01) is None


def test_closed_sessions_and_those_without_a_rhythm_are_not_waited_for():
    window = BatchWindow()
    seen(window, "other", 0.5, 10.0)
    window.closed("other")
    window.arrived("new", 10.0)
    window.answered("new", 10.1)
    assert window.wait(1, PASS, 10.2) is None


def test_one_long_absence_is_soon_forgotten():
    window = BatchWindow()
    seen(window, "other", 0.1, 10.0)
    window.arrived("other", 500.0)
    window.answered("other", 500.1)
    wait = window.wait(1, PASS, 500.15)
    assert wait is not None
    assert wait.until < 500.5


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
    await engine.close()

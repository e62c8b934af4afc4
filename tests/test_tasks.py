"""Deadlines that raise our own error, and tasks that do not outlive what they belong to."""

from __future__ import annotations

import asyncio
import logging

import pytest

from swarmcore.errors import DeadlineExceededError, ServerDrainingError, SessionLostError
from swarmcore.tasks import (
    BackgroundTasks,
    cancel_and_wait,
    deadline_after,
    deadline_at,
    running,
    wait_until_set,
)


async def test_a_deadline_that_passes_raises_our_error() -> None:
    with pytest.raises(DeadlineExceededError, match="no answer came") as caught:
        async with deadline_after(0, "no answer came"):
            await asyncio.Event().wait()
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_deadline_on_the_clock_of_the_loop() -> None:
    with pytest.raises(DeadlineExceededError, match="no answer came"):
        async with deadline_at(asyncio.get_running_loop().time(), "no answer came"):
            await asyncio.Event().wait()


async def test_the_error_can_be_made_when_the_deadline_passes() -> None:
    with pytest.raises(ServerDrainingError, match="it leaves"):
        async with deadline_after(None, lambda: ServerDrainingError("it leaves")) as clock:
            clock.reschedule(0)
            await asyncio.Event().wait()


async def test_errors_of_the_block_go_through() -> None:
    with pytest.raises(TimeoutError, match="of somebody else"):
        async with deadline_after(60, "no answer came"):
            raise TimeoutError("of somebody else")
    async with asyncio.timeout(None) as outer:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                async with deadline_after(60, "no answer came"):
                    await asyncio.Event().wait()
    assert not outer.expired()


async def test_waiting_for_an_event() -> None:
    event = asyncio.Event()
    assert not await wait_until_set(event, 0)
    asyncio.get_running_loop().call_soon(event.set)
    assert await wait_until_set(event, 60)
    assert await wait_until_set(event, 0)


async def test_a_task_runs_as_long_as_the_block() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("work")

    async with running(work(), "work") as task:
        await asyncio.sleep(0)
        assert not task.done()
    assert ended == ["work"]


async def test_errors_of_cancelled_tasks_do_not_come_out(caplog: pytest.LogCaptureFixture) -> None:
    async def lost() -> None:
        raise SessionLostError("an end that was expected")

    async def broken() -> None:
        raise ValueError("a bug")

    async with running(lost(), "lost task"), running(broken(), "broken task"):
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["broken task ended unexpectedly"]
    assert caplog.records[0].levelno == logging.ERROR


async def test_cancelling_waits_for_the_end_even_when_cancelled_itself() -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with pytest.raises(asyncio.CancelledError):  # the second cancellation
                await release.wait()
            await asyncio.sleep(0)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(cancel_and_wait(task, None))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert task.done()


async def test_background_tasks_end_with_their_owner(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ValueError("a bug")

    tasks = BackgroundTasks()
    tasks.start(asyncio.Event().wait(), "endless task")
    tasks.start(broken(), "broken task")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(tasks) == 1
    await tasks.close()
    assert len(tasks) == 0
    tasks.start(broken(), "dropped task")
    await tasks.close()
    assert [record.getMessage() for record in caplog.records] == ["broken task ended unexpectedly"]

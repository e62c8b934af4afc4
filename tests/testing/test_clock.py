from __future__ import annotations

import asyncio
import time

import pytest

from swarmcore.testing import clock


def test_a_day_passes_at_once_and_in_order() -> None:
    woke: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woke.append((name, asyncio.get_running_loop().time()))

    async def main() -> float:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sleeper("late", 86_000.0))
            tasks.create_task(sleeper("early", 0.25))
            tasks.create_task(sleeper("middle", 3600.0))
        return asyncio.get_running_loop().time()

    assert clock.run(main(), start=100.0) == pytest.approx(86_100.0)
    assert [name for name, _ in woke] == ["early", "middle", "late"]
    assert [when for _, when in woke] == pytest.approx([100.25, 3700.0, 86_100.0])


def test_timeouts_fire_on_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                await asyncio.get_running_loop().create_future()
        return asyncio.get_running_loop().time()

    assert clock.run(main()) == pytest.approx(30.0)


def test_the_clock_stands_while_a_thread_works() -> None:
    async def main() -> float:
        async with asyncio.timeout(0.001):
            await asyncio.to_thread(time.sleep, 0.02)
        return asyncio.get_running_loop().time()

    assert clock.run(main()) == 0.0


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(clock.VirtualTimeError, match="no timer"):
        clock.run(main())


def test_time_does_not_run_past_the_horizon() -> None:
    async def tick_for_ever() -> None:
        for _ in range(1000):
            await asyncio.sleep(1.0)

    with pytest.raises(clock.VirtualTimeError, match="still running"):
        clock.run(tick_for_ever(), horizon=50.0)


def test_timers_of_one_moment_go_off_in_the_order_in_which_they_were_set() -> None:
    rang: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2.0, rang.append, "second")
        first = loop.call_later(1.0, rang.append, "first")
        loop.call_at(2.0, loop.call_later, 0.0, rang.append, "last")
        loop.call_at(2.0, rang.append, "third")
        never = loop.call_at(2.0, rang.append, "never")
        never.cancel()
        assert (never.cancelled(), first.cancelled(), first.when()) == (True, False, 1.0)
        await asyncio.sleep(3.0)
        first.cancel()  # too late
        assert not first.cancelled()

    clock.run(main())
    assert rang == ["first", "second", "third", "last"]


def test_a_timer_is_due_although_the_loop_is_never_idle() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.call_later(0.0, done.set_result, None)
        while not done.done():
            await asyncio.sleep(0)
        return loop.time()

    assert clock.run(main()) == 0.0


def test_cancelled_timers_take_no_room_for_long() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, clock.VirtualClockLoop)
        for _ in range(1000):
            loop.call_later(3600.0, print).cancel()
        return len(loop._timers)

    assert clock.run(main()) < 300


def test_an_error_in_a_timer_is_reported_and_ends_nothing() -> None:
    reported: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(repr(context["exception"])))
        loop.call_later(1.0, int, "x")
        await asyncio.sleep(2.0)

    clock.run(main())
    assert len(reported) == 1
    assert "ValueError" in reported[0]


@pytest.mark.virtual_time
async def test_the_marker_gives_a_test_a_virtual_loop() -> None:
    assert isinstance(asyncio.get_running_loop(), clock.VirtualClockLoop)
    await asyncio.sleep(3600.0)


async def test_an_unmarked_test_has_an_ordinary_loop() -> None:
    assert not isinstance(asyncio.get_running_loop(), clock.VirtualClockLoop)

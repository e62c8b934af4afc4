"""Sessions wait for room in the attention cache, or make it."""

from __future__ import annotations

import asyncio
import math

import pytest
from counting_engine import expected, run, running, some_rows, submit

from swarmcore.errors import CacheFullError, SessionLostError
from swarmcore.testing import clock
from swarmcore.testing.executor import read_rows


async def test_a_new_session_is_let_in_when_another_ends() -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 16, timeout=1.0)
        assert (engine.cache_tokens_free, engine.cache_tokens_used) == (0, 16)
        assert engine.cache_pages == (4, 4) and engine.counters["cache_pages_used"] == 4
        second = asyncio.create_task(engine.open("b", 1, 8, timeout=60.0))
        await asyncio.sleep(0)
        assert not second.done()
        engine.close_session("a")
        await second
        assert engine.cache_tokens_free == 8


def test_admission_gives_up_at_its_deadline() -> None:
    async def scenario() -> None:
        async with running(cache_tokens=16, idle_timeout=100.0) as (engine, _):
            await engine.open("a", 1, 16, timeout=1.0)
            with pytest.raises(CacheFullError, match="no room came free for a new session") as caught:
                await engine.open("b", 1, 8, timeout=20.0)
            assert asyncio.get_running_loop().time() == pytest.approx(20.0)
            assert caught.value.retry_after == pytest.approx(10.0), "what a does not use"
            assert engine.stats.refusals == 1
            # The name was not used up, and the wait was long enough now.
            await engine.open("b", 1, 8, timeout=90.0)
            assert asyncio.get_running_loop().time() == pytest.approx(30.0)

    clock.run(scenario())


@pytest.mark.parametrize("freed_first", [False, True])
async def test_a_cancelled_open_holds_nothing(freed_first: bool) -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 16, timeout=1.0)
        waiting = asyncio.create_task(engine.open("b", 1, 8, timeout=60.0))
        await asyncio.sleep(0)
        if freed_first:
            engine.close_session("a")
            waiting.cancel()
        else:
            waiting.cancel()
            engine.close_session("a")
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (engine.sessions, engine.cache_tokens_free) == (0, 16)


async def test_a_step_waits_for_room_and_runs_when_it_comes() -> None:
    async with running(cache_tokens=16) as (engine, _):
        rows = some_rows(12)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:8])
        growing = submit(engine, "a", 8, rows[8:])
        behind = submit(engine, "a", 12, rows[:1])
        await asyncio.sleep(0)
        assert not growing.done()
        behind.cancel()
        engine.close_session("b")
        assert read_rows(await growing) == (await expected(rows))[8:]


def test_a_step_gives_up_waiting_for_room_at_its_deadline() -> None:
    async def scenario() -> None:
        async with running(cache_tokens=16, idle_grace=600.0) as (engine, _):
            for name in "ab":
                await engine.open(name, 1, 0, timeout=1.0)
                await run(engine, name, 0, some_rows(8))
            with pytest.raises(CacheFullError, match="no room came free for the session to grow") as caught:
                await submit(engine, "a", 8, some_rows(1), timeout=7.0)
            assert asyncio.get_running_loop().time() == pytest.approx(7.0)
            assert caught.value.retry_after == pytest.approx(593.0)
            assert engine.length("a") == (8,)
            # What needs no room goes on.
            await run(engine, "a", 7, some_rows(1))

    clock.run(scenario())


async def test_when_all_wait_for_room_the_youngest_session_makes_it() -> None:
    async with running(cache_tokens=16) as (engine, _):
        rows = some_rows(9)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:8])
        older, younger = submit(engine, "a", 8, rows[8:]), submit(engine, "b", 8, rows[8:])
        assert read_rows(await older) == (await expected(rows))[8:]
        with pytest.raises(SessionLostError, match="session b was ended: the server needed its room"):
            await younger
        assert engine.sessions == 1 and engine.stats.sessions_evicted == 1


def test_idle_sessions_expire_and_busy_ones_do_not() -> None:
    async def scenario() -> None:
        async with running(idle_timeout=60.0) as (engine, _):
            for name in ("idle", "busy"):
                await engine.open(name, 1, 40, timeout=1.0)
            for position in range(10):
                await run(engine, "busy", position, some_rows(1))
                await asyncio.sleep(10.0)
            with pytest.raises(SessionLostError, match="open a new one and replay"):
                submit(engine, "idle", 0, some_rows(1))
            assert engine.length("busy") == (10,)
            assert engine.cache_tokens_used == 40

    clock.run(scenario())


async def test_a_step_above_the_whole_cache_fails_and_the_session_goes_on() -> None:
    async with running(cache_tokens=16) as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        with pytest.raises(CacheFullError, match="has 16 in all") as caught:
            await submit(engine, "a", 0, some_rows(17))
        assert caught.value.retry_after == math.inf
        await run(engine, "a", 0, some_rows(16))

"""Sessions and the engine end in good order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from counting_engine import expected, run, running, some_rows, submit

from swarmcore.errors import ServerDrainingError, SessionLostError
from swarmcore.testing import clock
from swarmcore.testing.executor import hidden_states, read_rows


async def test_closing_a_session_frees_its_cache_at_once() -> None:
    async with running() as (engine, executor):
        await engine.open("a", 2, 0, timeout=1.0)
        await engine.step("a", (0, 0), (5, 5), hidden_states(some_rows(10)), timeout=5.0)
        assert engine.cache_tokens_used == executor.reserved_tokens == 16
        engine.close_session("a")
        engine.close_session("a")
        assert engine.cache_tokens_used == executor.reserved_tokens == 0
        with pytest.raises(SessionLostError):
            engine.length("a")


async def test_closing_a_computing_session_frees_its_cache_after_the_batch() -> None:
    async with running() as (engine, executor):
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 0, timeout=1.0)
        answer = submit(engine, "a", 0, some_rows(6))
        while not executor.computing:
            await asyncio.sleep(0)
        engine.close_session("a")
        with pytest.raises(SessionLostError, match="was closed"):
            await answer
        assert engine.sessions == 0 and engine.cache_tokens_used == 8
        # The name is free again, and is another session.
        await engine.open("a", 1, 0, timeout=1.0)
        again = submit(engine, "a", 0, some_rows(2))
        executor.gate.set()
        assert read_rows(await again) == await expected(some_rows(2))
        assert engine.cache_tokens_used == executor.reserved_tokens == 4


async def test_closing_the_engine_ends_everything() -> None:
    async with running(cache_tokens=16) as (engine, executor):
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 16, timeout=1.0)
        opening = asyncio.create_task(engine.open("b", 1, 16, timeout=60.0))
        computing, queued = submit(engine, "a", 0, some_rows(2)), submit(engine, "a", 2, some_rows(2))
        while not executor.computing:
            await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(ServerDrainingError):
            await opening
        for answer in (computing, queued):
            with pytest.raises(SessionLostError, match="shutting down"):
                await answer
        assert not closing.done()
        executor.gate.set()
        await closing
        await engine.close()
        with pytest.raises(ServerDrainingError):
            await engine.open("c", 1, 0, timeout=1.0)
        with pytest.raises(SessionLostError):
            submit(engine, "a", 0, some_rows(1))


def test_an_idle_engine_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(idle_timeout=600.0) as (engine, executor):
            loop = asyncio.get_running_loop()
            await engine.open("a", 1, 0, timeout=1.0)
            await run(engine, "a", 0, some_rows(4))
            calls = 0
            call_at = loop.call_at

            def counting(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
                nonlocal calls
                calls += 1
                return call_at(*args, **kwargs)

            monkeypatch.setattr(loop, "call_at", counting)
            await asyncio.sleep(3600.0)
            assert calls <= 4
            assert len(executor.batches) == 1 and engine.sessions == 0

    clock.run(scenario())


async def test_repr_shows_the_state() -> None:
    async with running() as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(4))
        assert repr(engine) == (
            "<Engine 0:12 · 1 sessions · cache 4/400 · 0 tokens pending · 1 steps in 1 batches · 0 passes>"
        )

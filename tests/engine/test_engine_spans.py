"""Sessions on parts of the span, and a span that changes under the engine."""

from __future__ import annotations

import asyncio

import pytest
from counting_engine import expected, run, running, some_rows, submit

from swarmcore.errors import CacheFullError, SpanError
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.types import Span


async def test_a_session_pays_for_the_blocks_it_passes_through() -> None:
    async with running(cache_tokens=48) as (engine, executor):
        await engine.open("whole", 1, 0, timeout=1.0)
        await run(engine, "whole", 0, some_rows(16))
        await engine.open("third", 2, 0, timeout=1.0, span=Span(2, 6))
        await run(engine, "whole", 16, some_rows(1))
        assert engine.cache_tokens_used == 20
        hidden = some_rows(26)
        both = engine.step("third", (0, 0), (13, 13), hidden_states(hidden), timeout=5.0)
        first, second = await expected(hidden[:13], Span(2, 6)), await expected(hidden[13:], Span(2, 6))
        assert read_rows(await both) == first + second
        # 13 tokens are 4 pages, of which a third is charged, rounded up.
        assert engine.cache_tokens_used == 20 + 2 * 2 * 4
        assert executor.reserved_tokens == 20 + 2 * 6 * 4
        engine.close_session("third")
        assert engine.cache_tokens_used == executor.reserved_tokens == 20


async def test_room_set_aside_for_a_part_of_the_span() -> None:
    async with running(cache_tokens=48) as (engine, _):
        await engine.open("a", 2, 100, timeout=1.0, span=Span(0, 3))
        # 13 pages for each sequence, a quarter of them charged.
        assert engine.cache_tokens_used == 2 * 4 * 4
        with pytest.raises(CacheFullError, match="has 48 in all"):
            await engine.open("b", 1, 100, timeout=1.0, span=Span(0, 6))


async def test_sessions_are_opened_on_what_is_held_at_the_time() -> None:
    async with running() as (engine, executor):
        rows, stays = some_rows(4), Span(6, 12)
        await engine.open("a", 1, 0, timeout=1.0, span=stays)
        await run(engine, "a", 0, rows[:2])
        await executor.change_span(stays)
        executor.loading = asyncio.Event()
        moving = asyncio.create_task(executor.change_span(Span(4, 12)))
        await asyncio.sleep(0)
        with pytest.raises(SpanError, match="this server holds 6:12"):
            await engine.open("b", 1, 0, timeout=1.0, span=Span(0, 6))
        await engine.open("b", 1, 0, timeout=1.0, span=stays)
        assert read_rows(await submit(engine, "a", 2, rows[2:])) == (await expected(rows, stays))[2:]
        executor.loading.set()
        await moving
        await engine.open("c", 1, 0, timeout=1.0)
        assert await run(engine, "c", 0, rows) == await expected(rows, Span(4, 12))


async def test_the_cache_is_the_same_memory_whatever_the_span() -> None:
    async with running(cache_tokens=48) as (engine, executor):
        await engine.open("a", 1, 0, timeout=1.0, span=Span(0, 6))
        await run(engine, "a", 0, some_rows(16))
        assert (engine.cache_tokens, engine.cache_tokens_used, engine.cache_tokens_free) == (48, 8, 40)
        await executor.change_span(Span(0, 6))
        assert (engine.cache_tokens, engine.cache_tokens_used, engine.cache_tokens_free) == (96, 16, 80)
        await engine.open("b", 1, 72, timeout=1.0)
        assert engine.cache_tokens_free == 8


async def test_a_session_is_not_let_in_to_blocks_that_left_while_it_waited() -> None:
    async with running(cache_tokens=16) as (engine, executor):
        await engine.open("a", 1, 16, timeout=1.0)
        waiting = asyncio.create_task(engine.open("b", 1, 8, timeout=60.0, span=Span(0, 6)))
        await asyncio.sleep(0)
        await executor.change_span(Span(6, 12))
        engine.close_session("a")
        with pytest.raises(SpanError, match="blocks 0:6 are not all here: this server holds 6:12"):
            await waiting
        assert engine.sessions == 0 and engine.cache_tokens_used == 0

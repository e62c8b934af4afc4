"""Sessions that begin with what was computed before, through the engine, with exact arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from counting_engine import expected, run, running, some_rows, submit, submit_beams

from swarmcore.engine.engine import Engine
from swarmcore.engine.prefix_cache import PrefixScope
from swarmcore.errors import CacheFullError, SessionLostError
from swarmcore.testing.executor import CountingExecutor, read_rows
from swarmcore.types import Span

ROWS = some_rows(14)
TAIL = some_rows(3, seed=1)


def names(text: str) -> bytes:
    return b"".join(text[:end].encode().ljust(16) for end in range(1, len(text) + 1))


@asynccontextmanager
async def prefixes(**options: Any) -> AsyncIterator[tuple[Engine, CountingExecutor]]:
    async with running(named_tokens=4, **options) as (engine, executor):
        yield engine, executor


async def begin(engine: Engine, session: str, *texts: str, **options: Any) -> tuple[int, ...]:
    caller = options.pop("caller", "alice")
    each = [names(text) for text in texts]
    return await engine.open(
        session, len(texts), 0, options.pop("timeout", 1.0), caller=caller, names=each, **options
    )


async def prompted(engine: Engine, session: str, text: str, count: int = 14) -> None:
    """A session that has computed ``count`` rows of `ROWS`, of which whole pages are called ``text``."""
    await begin(engine, session, text)
    await run(engine, session, 0, ROWS[:count])


@pytest.mark.parametrize("closed", [True, False])
async def test_a_second_session_begins_where_the_first_has_been(closed: bool) -> None:
    async with prefixes() as (engine, _):
        await prompted(engine, "a", "xyz")
        if closed:
            engine.close_session("a")
            assert engine.cache_tokens_used == 0 and engine.prefixes.pages == 3
        computed = engine.stats.tokens
        assert await begin(engine, "b", "xyzw") == (12,)
        assert engine.progress("b")[0] == 0
        rows = ROWS[:12] + TAIL
        assert await run(engine, "b", 12, TAIL) == (await expected(rows))[12:]
        assert engine.stats.tokens == computed + len(TAIL)
        assert engine.counters["prefix_hits"] == 1 and engine.counters["prefix_tokens"] == 12
        # And it may begin below that.
        assert await begin(engine, "c", "xyz") == (12,)
        assert await run(engine, "c", 5, TAIL) == (await expected(ROWS[:5] + TAIL))[5:]


async def test_sequences_begin_each_with_their_own() -> None:
    async with prefixes() as (engine, _):
        await prompted(engine, "a", "xyz")
        assert await begin(engine, "b", "xyz", "q", "xy") == (12, 0, 8)
        result = await submit_beams(engine, "b", [12, 0, 8], [TAIL, TAIL, TAIL])
        wholes = [await expected(ROWS[:start] + TAIL) for start in (12, 0, 8)]
        assert read_rows(result) == [row for whole in wholes for row in whole[-3:]]


async def test_others_names_are_not_found_unless_all_share_a_namespace() -> None:
    async with prefixes() as (engine, _):
        await prompted(engine, "a", "xyz")
        assert await begin(engine, "b", "xyz", caller="bob") == (0,)
        together = PrefixScope("", engine.executor.span)
        await begin(engine, "c", "xyz", scope=together)
        await run(engine, "c", 0, ROWS)
        assert await begin(engine, "d", "xyz", caller="bob", scope=together) == (12,)


@pytest.mark.parametrize("start", [0, 5, 14])
async def test_pages_that_are_all_called_the_same_harm_nobody(start: int) -> None:
    async with prefixes() as (engine, _):
        for session in "ab":
            await engine.open(session, 1, 0, 1.0, caller="mallory", names=[names("x") * 3])
            await run(engine, session, 0, ROWS)
            await run(engine, session, start, TAIL)
            engine.name_prefixes(session, [names("x") * 4])
            engine.close_session(session)
        await prompted(engine, "c", "xyz")
        engine.close_session("c")
        assert await begin(engine, "d", "xyz") == (12,)
        assert await begin(engine, "e", "yyy", caller="mallory") == (0,)


async def test_a_part_of_the_blocks_is_another_prefix() -> None:
    async with prefixes() as (engine, _):
        part = Span(0, 6)
        await begin(engine, "a", "xyz", span=part)
        await run(engine, "a", 0, ROWS)
        engine.close_session("a")
        assert await begin(engine, "b", "xyz") == (0,)
        assert await begin(engine, "c", "xyz", span=part) == (12,)
        assert await run(engine, "c", 12, TAIL) == (await expected(ROWS[:12] + TAIL, part))[12:]
        assert engine.prefixes.pages == 2, "half of three pages, rounded up"


async def test_what_is_kept_makes_room_for_whoever_asks_before_anyone_waits() -> None:
    async with prefixes(cache_tokens=32) as (engine, _):
        await prompted(engine, "a", "xyz", 13)
        engine.close_session("a")
        assert engine.cache_tokens_free == 32 and engine.prefixes.pages == 3
        await engine.open("b", 1, 0, timeout=0.0)
        await run(engine, "b", 0, some_rows(17, seed=3))  # there is room for both
        assert engine.prefixes.pages == 3
        await run(engine, "b", 17, some_rows(4, seed=4))
        assert engine.prefixes.pages == 0
        assert engine.counters["sessions_evicted"] == engine.counters["refusals"] == 0


async def test_a_session_without_room_for_its_prefix_begins_with_nothing() -> None:
    async with prefixes(cache_tokens=16) as (engine, _):
        await prompted(engine, "a", "xy", 9)
        assert await begin(engine, "b", "xy") == (0,)
        with pytest.raises(CacheFullError):
            await submit(engine, "b", 0, ROWS[:9], timeout=0.1)


async def test_a_rollback_ends_what_is_found() -> None:
    async with prefixes() as (engine, _):
        await prompted(engine, "a", "xyz")
        await run(engine, "a", 6, TAIL)
        assert await begin(engine, "b", "xyz") == (4,)
        engine.close_session("a")
        assert engine.prefixes.pages == 0, "the other session has the same page"
        engine.close_session("b")
        assert engine.prefixes.pages == 1


async def test_a_step_that_fails_ends_what_it_had_begun_to_write_over() -> None:
    async with prefixes() as (engine, executor):
        await prompted(engine, "a", "xyz")
        executor.failures.append(RuntimeError("the device is gone"))
        with pytest.raises(Exception, match="RuntimeError"):
            await run(engine, "a", 6, TAIL)
        assert await begin(engine, "b", "xyz") == (4,)
        assert await run(engine, "b", 4, TAIL) == (await expected(ROWS[:4] + TAIL))[4:]


async def test_beams_are_called_what_they_are_copies_of() -> None:
    async with prefixes() as (engine, _):
        await begin(engine, "a", "xyz", "uv")
        await submit_beams(engine, "a", [0, 0], [ROWS, TAIL * 3])
        await submit_beams(engine, "a", [14, 14], [TAIL[:1], TAIL[:1]], [0, 0])
        assert await begin(engine, "b", "uv") == (0,)
        engine.close_session("a")
        assert engine.prefixes.pages == 3
        assert await begin(engine, "c", "xyz") == (12,)
        assert await run(engine, "c", 12, TAIL) == (await expected(ROWS[:12] + TAIL))[12:]


async def test_a_session_names_what_it_has_generated() -> None:
    async with prefixes() as (engine, _):
        await prompted(engine, "a", "xy", 9)
        for position in range(9, 13):
            await run(engine, "a", position, ROWS[position : position + 1])
        engine.name_prefixes("a", [names("xyz")])
        engine.close_session("a")
        assert await begin(engine, "b", "xyz") == (12,)
        assert await run(engine, "b", 12, TAIL) == (await expected(ROWS[:12] + TAIL))[12:]


async def test_an_imported_cache_has_the_names_of_its_session() -> None:
    async with prefixes() as (old, _), prefixes() as (new, _):
        await prompted(old, "a", "xyz")
        await begin(new, "a", "xyz")
        async for chunk in old.export_cache("a", max_bytes=10**6):
            await new.import_cache("a", 0, chunk.start, chunk.count, chunk.tensors, timeout=1.0)
        new.close_session("a")
        assert await begin(new, "b", "xyz") == (12,)
        assert await run(new, "b", 12, TAIL) == (await expected(ROWS[:12] + TAIL))[12:]


async def test_a_session_that_ends_while_it_computes_is_kept_as_far_as_it_was() -> None:
    async with prefixes() as (engine, executor):
        await prompted(engine, "a", "xyz", 9)
        executor.gate = asyncio.Event()
        step = submit(engine, "a", 9, ROWS[9:])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.close_session("a")
        executor.gate.set()
        with pytest.raises(SessionLostError):
            await step
        executor.gate = None
        assert await begin(engine, "b", "xyz") == (8,)
        assert await run(engine, "b", 8, TAIL) == (await expected(ROWS[:8] + TAIL))[8:]


async def test_a_prefix_that_goes_while_it_is_shared_is_one_that_was_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with prefixes() as (engine, executor):
        await prompted(engine, "a", "xyz")
        engine.close_session("a")
        gate, share = asyncio.Event(), executor.share_prefix

        async def held(*args: Any) -> None:
            await gate.wait()
            await share(*args)

        monkeypatch.setattr(executor, "share_prefix", held)
        opening = asyncio.create_task(begin(engine, "b", "xyz"))
        await asyncio.sleep(0)
        engine.forget_prefixes(Span(0, 1))
        gate.set()
        assert await opening == (0,)
        assert await run(engine, "b", 0, TAIL) == await expected(TAIL)


async def test_a_prefix_that_the_executor_has_lost_is_forgotten() -> None:
    async with prefixes() as (engine, executor):
        for session in "ab":
            await prompted(engine, session, "xyz")
            engine.close_session(session)
            executor._caches.clear()
            assert await begin(engine, session + session, "xyz") == (0,)
            assert engine.prefixes.pages == 0
            await run(engine, session + session, 0, ROWS)
            engine.close_session(session + session)
            assert engine.prefixes.pages == 3
            engine.forget_prefixes(Span(0, 1))


async def test_an_opening_that_is_cancelled_while_it_shares_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with prefixes() as (engine, executor):
        await prompted(engine, "a", "xyz")
        gate = asyncio.Event()

        async def held(*args: Any) -> None:
            await gate.wait()

        monkeypatch.setattr(executor, "share_prefix", held)
        opening = asyncio.create_task(begin(engine, "b", "xyz"))
        while engine.sessions < 2:
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        gate.set()
        assert engine.sessions == 1
        await run(engine, "a", 14, TAIL)


async def test_blocks_that_leave_take_what_is_kept_with_them() -> None:
    async with prefixes() as (engine, executor):
        for session, span in (("a", Span(0, 4)), ("b", Span(0, 12))):
            await begin(engine, session, "xyz", span=span)
            await run(engine, session, 0, ROWS)
            engine.close_session(session)
        engine.forget_prefixes(Span(0, 6))
        await executor.change_span(Span(0, 6))  # which asserts that no sequence needs the others
        assert await begin(engine, "c", "xyz", span=Span(0, 4)) == (12,)

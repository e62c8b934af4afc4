"""Attention caches of sessions, out in chunks and in again."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import attrs
import pytest
from counting_engine import expected, run, running, some_rows, submit, submit_beams

from swarmcore.engine.engine import Engine
from swarmcore.engine.kv_transfer import KVChunk
from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InputError,
    InvalidStepError,
    RemoteFaultError,
    SessionLostError,
)
from swarmcore.testing.executor import CountingExecutor, read_rows
from swarmcore.wire.tensors import Tensor

TOKEN = CountingExecutor().cache_bytes_per_token


async def export(engine: Engine, session: str, max_bytes: int = 3 * TOKEN) -> list[KVChunk]:
    return [chunk async for chunk in engine.export_cache(session, max_bytes=max_bytes)]


async def take_in(engine: Engine, session: str, *chunks: KVChunk, timeout: float = 5.0) -> None:
    for chunk in chunks:
        await engine.import_cache(
            session, chunk.sequence, chunk.start, chunk.count, chunk.tensors, timeout=timeout
        )


def hold_imports(executor: CountingExecutor, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Imports of the executor wait for this event."""
    gate, import_cache = asyncio.Event(), executor.import_cache

    async def held(*args: Any) -> None:
        await gate.wait()
        await import_cache(*args)

    monkeypatch.setattr(executor, "import_cache", held)
    return gate


async def test_a_session_goes_on_elsewhere_from_its_exported_cache() -> None:
    async with running() as (old, _), running() as (new, _):
        prompts, tail = [some_rows(7), some_rows(3, seed=1)], some_rows(2, seed=2)
        for engine in (old, new):
            await engine.open("a", 2, 0, timeout=1.0)
        await submit_beams(old, "a", [0, 0], prompts)
        chunks = await export(old, "a")
        assert [(c.sequence, c.start, c.count) for c in chunks] == [
            (0, 0, 3),
            (0, 3, 3),
            (0, 6, 1),
            (1, 0, 3),
        ]
        assert max(sum(t.data.nbytes for t in c.tensors) for c in chunks) <= 3 * TOKEN
        await take_in(new, "a", *chunks)
        assert new.length("a") == old.length("a") == (7, 3)
        assert new.cache_tokens_used == old.cache_tokens_used
        for engine in (old, new):
            result = await submit_beams(engine, "a", [7, 3], [tail, tail])
            whole = [await expected(rows + tail) for rows in prompts]
            assert read_rows(result) == whole[0][7:] + whole[1][3:]


async def test_steps_wait_while_their_session_is_exported_and_others_go_on() -> None:
    async with running() as (engine, _):
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(6))
        chunks = engine.export_cache("a", max_bytes=TOKEN)
        await anext(chunks)
        waiting = submit(engine, "a", 2, some_rows(1))
        assert await run(engine, "b", 0, some_rows(2)) == await expected(some_rows(2))
        rest = [chunk async for chunk in chunks]
        assert [chunk.start for chunk in rest] == [1, 2, 3, 4, 5]
        assert read_rows(await waiting) == (await expected(some_rows(6)[:2] + some_rows(1)))[2:]


async def test_an_export_that_is_given_up_lets_the_session_go_on() -> None:
    async with running() as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(6))
        chunks = engine.export_cache("a", max_bytes=TOKEN)
        await anext(chunks)
        await chunks.aclose()
        assert await run(engine, "a", 5, some_rows(6)[5:]) == (await expected(some_rows(6)))[5:]


async def test_a_session_that_is_closed_while_exported_frees_its_cache_afterwards() -> None:
    async with running() as (engine, executor):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(6))
        chunks = engine.export_cache("a", max_bytes=TOKEN)
        await anext(chunks)
        engine.close_session("a")
        assert engine.sessions == 0 and engine.cache_tokens_used == executor.reserved_tokens == 8
        with pytest.raises(SessionLostError, match="ended while it was exported"):
            await anext(chunks)
        assert engine.cache_tokens_used == executor.reserved_tokens == 0


@pytest.mark.virtual_time
async def test_a_session_is_not_idle_while_exported() -> None:
    async with running(cache_tokens=16, idle_timeout=60.0, idle_grace=1.0) as (engine, _):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(8))
        chunks = engine.export_cache("a", max_bytes=4 * TOKEN)
        await anext(chunks)
        await asyncio.sleep(100.0)
        await engine.open("b", 1, 0, timeout=1.0)
        with pytest.raises(CacheFullError):
            await submit(engine, "b", 0, some_rows(12), timeout=10.0)
        assert [chunk.start async for chunk in chunks] == [4]
        await asyncio.sleep(61.0)
        assert engine.sessions == 0


async def test_what_cannot_be_exported() -> None:
    async with running() as (engine, executor):
        with pytest.raises(SessionLostError):
            engine.export_cache("a", max_bytes=TOKEN)
        await engine.open("a", 1, 0, timeout=1.0)
        assert await export(engine, "a") == []
        await run(engine, "a", 0, some_rows(2))
        with pytest.raises(InputError, match="no chunk of"):
            await export(engine, "a", TOKEN - 1)
        executor.gate = asyncio.Event()
        step = submit(engine, "a", 2, some_rows(1))
        with pytest.raises(InvalidStepError, match="has queued steps"):
            await export(engine, "a")
        executor.gate.set()
        await step
        assert len(await export(engine, "a")) == 1


async def test_an_import_stands_in_line_with_steps() -> None:
    async with running() as (engine, _):
        rows = some_rows(8)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
        await run(engine, "a", 0, rows[:6])
        chunks = await export(engine, "a", 99 * TOKEN)
        first = asyncio.create_task(take_in(engine, "b", *chunks))
        await asyncio.sleep(0)
        assert read_rows(await submit(engine, "b", 6, rows[6:])) == (await expected(rows))[6:]
        await first
        # Back to an earlier position, as a step would.
        back = attrs.evolve(chunks[0], count=2, tensors=await _part(engine, 2))
        await take_in(engine, "b", back)
        assert engine.length("b") == (2,) and engine.cache_tokens_used == 12


async def _part(engine: Engine, count: int) -> tuple[Tensor, ...]:
    [chunk, *_] = await export(engine, "a", count * TOKEN)
    return chunk.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": 1}, "one of 0 to 0"),
        ({"sequence": -1}, "one of 0 to 0"),
        ({"count": 0}, "a cache of 0 tokens"),
        ({"start": -1}, "start -1"),
        ({"start": 3}, "ahead of its 2 cached tokens"),
        ({"tensors": ()}, "layout"),
        ({"count": 3}, "layout"),
        ({"timeout": math.nan}, "not a number"),
    ],
)
async def test_imports_that_cannot_be(change: dict[str, Any], message: str) -> None:
    async with running() as (engine, _):
        rows = some_rows(4)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:2])
        [chunk] = await export(engine, "a")
        arguments = attrs.asdict(chunk, recurse=False) | {"session": "b", "timeout": 5.0} | change
        with pytest.raises(InvalidStepError, match=message):
            await engine.import_cache(**arguments)
        start = min(arguments["start"], 2) if arguments["tensors"] and arguments["count"] != 3 else 0
        assert engine.length("b") == ((2,) if start or message != "layout" else (0,))
        await run(engine, "b", 0, rows)


async def test_an_import_that_the_executor_fails_at_leaves_what_was_before_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as (engine, executor):
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(2))

        async def fail(*args: object) -> None:
            raise MemoryError

        monkeypatch.setattr(executor, "import_cache", fail)
        with pytest.raises(RemoteFaultError, match="MemoryError"):
            await engine.import_cache("a", 0, 2, 9, (), timeout=5.0)
        assert "failed to take in 9 tokens" in caplog.text
        assert engine.length("a") == (2,) and engine.cache_tokens_used == 4


@pytest.mark.virtual_time
async def test_an_import_waits_for_room_until_its_deadline() -> None:
    async with running(cache_tokens=16, idle_grace=600.0) as (engine, _):
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(8))
        chunks = await export(engine, "a", 99 * TOKEN)
        await run(engine, "a", 8, some_rows(4))
        with pytest.raises(CacheFullError, match="no room came free"):
            await take_in(engine, "b", *chunks, timeout=3.0)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        waiting = asyncio.create_task(take_in(engine, "b", *chunks, timeout=30.0))
        await asyncio.sleep(1.0)
        engine.close_session("a")
        await waiting
        assert engine.length("b") == (8,)


@pytest.mark.virtual_time
@pytest.mark.parametrize("end", ["late", "cancelled", "closed"])
async def test_an_import_that_ends_while_the_executor_is_at_it(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as (engine, executor):
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(6))
        chunks = await export(engine, "a", 99 * TOKEN)
        gate = hold_imports(executor, monkeypatch)
        importing = asyncio.create_task(take_in(engine, "b", *chunks, timeout=3.0))
        await asyncio.sleep(1.0)
        if end == "closed":
            engine.close_session("b")
        elif end == "cancelled":
            importing.cancel()
        errors: dict[str, type[BaseException]] = {
            "late": DeadlineExceededError,
            "cancelled": asyncio.CancelledError,
            "closed": SessionLostError,
        }
        with pytest.raises(errors[end]):
            await importing
        # The executor may still write into that cache: nobody else gets it yet.
        assert engine.cache_tokens_used == 16
        step = None if end == "closed" else submit(engine, "b", 0, some_rows(2))
        gate.set()
        if step is not None:
            assert read_rows(await step) == await expected(some_rows(2))
            assert engine.length("b") == (2,)
        await asyncio.sleep(0.1)
        assert engine.cache_tokens_used == (8 if end == "closed" else 12)


async def test_closing_the_engine_waits_for_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (engine, executor):
        await engine.open("a", 1, 0, timeout=1.0)
        gate = hold_imports(executor, monkeypatch)
        importing = asyncio.create_task(engine.import_cache("a", 0, 0, 1, (), timeout=5.0))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(SessionLostError, match="shutting down"):
            await importing
        assert not closing.done() and executor.reserved_tokens
        gate.set()
        await closing
        assert not executor.reserved_tokens

"""The engine on a counting executor: right results, whatever is batched, cut or rolled back."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
from counting_engine import expected, run, running, some_rows, submit

from swarmcore.engine.engine import Engine
from swarmcore.errors import CacheFullError, SessionLostError, SpanError
from swarmcore.testing import clock
from swarmcore.testing.executor import Rows, hidden_states, read_rows
from swarmcore.types import Span


async def test_prefill_then_decode_then_rollback() -> None:
    async with running() as (engine, _):
        rows, other = some_rows(9), some_rows(3, seed=1)
        await engine.open("a", 1, 0, timeout=1.0)
        assert await run(engine, "a", 0, rows[:7]) == (await expected(rows))[:7]
        assert await run(engine, "a", 7, rows[7:8]) == (await expected(rows))[7:8]
        assert await run(engine, "a", 8, rows[8:]) == (await expected(rows))[8:]
        assert engine.length("a") == (9,)
        assert await run(engine, "a", 4, other) == (await expected(rows[:4] + other))[4:]
        assert engine.length("a") == (7,)
        assert engine.cache_tokens_used == 8


async def test_a_long_step_is_run_in_parts_and_put_together() -> None:
    async with running(max_batch_tokens=5) as (engine, executor):
        rows = some_rows(23)
        await engine.open("a", 1, 0, timeout=1.0)
        assert await run(engine, "a", 0, rows) == await expected(rows)
        assert max(sum(tokens) for tokens in executor.batches) <= 5


@pytest.mark.parametrize("max_batch_tokens", [4, 512])
async def test_reply_last_gives_a_row_for_each_sequence_that_has_any(max_batch_tokens: int) -> None:
    async with running(max_batch_tokens=max_batch_tokens) as (engine, _):
        first, third = some_rows(6, seed=1), some_rows(3, seed=2)
        await engine.open("a", 3, 0, timeout=1.0)
        result = await engine.step(
            "a", (0, 0, 0), (6, 0, 3), hidden_states(first + third), reply="last", timeout=5.0
        )
        assert read_rows(result) == [(await expected(first))[-1], (await expected(third))[-1]]
        assert engine.length("a") == (6, 0, 3)


@pytest.mark.parametrize("max_batch_tokens", [4, 512])
async def test_hidden_states_come_and_go_in_a_codec(max_batch_tokens: int) -> None:
    async with running(max_batch_tokens=max_batch_tokens) as (engine, _):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)
        hidden = hidden_states(rows).encode("raw+zstd")
        result = await engine.step("a", (0,), (6,), hidden, codec="raw+zstd", timeout=5.0)
        assert result.codec == "raw+zstd"
        assert read_rows(result) == await expected(rows)


async def test_steps_in_line_need_not_wait_for_each_other() -> None:
    async with running() as (engine, _):
        rows = some_rows(12)
        await engine.open("a", 1, 0, timeout=1.0)
        answers = [submit(engine, "a", start, rows[start : start + 4]) for start in (0, 4, 8)]
        assert engine.length("a") == (0,)
        results = [row for answer in answers for row in read_rows(await answer)]
        assert results == await expected(rows)


async def test_decode_steps_of_one_moment_share_a_batch() -> None:
    async with running() as (engine, executor):
        for name in "abc":
            await engine.open(name, 1, 0, timeout=1.0)

        async def generate(name: str) -> None:
            for position in range(5):
                await submit(engine, name, position, some_rows(1))

        await asyncio.gather(*(generate(name) for name in "abc"))
        assert list(executor.batches) == [(1, 1, 1)] * 5
        assert engine.stats.mean_batch == 3.0 and engine.counters["steps"] == 15.0


async def test_sessions_of_a_part_of_the_span() -> None:
    async with running() as (engine, _):
        rows, part = some_rows(3), Span(2, 5)
        await engine.open("a", 1, 0, timeout=1.0, span=part)
        await engine.open("b", 1, 0, timeout=1.0)
        partial, whole = submit(engine, "a", 0, rows), submit(engine, "b", 0, rows)
        assert read_rows(await partial) == await expected(rows, part)
        assert read_rows(await whole) == await expected(rows)
        with pytest.raises(SpanError, match="blocks 3:13 are not all here: this server holds 0:12"):
            await engine.open("c", 1, 0, timeout=1.0, span=Span(3, 13))


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_sessions_gives_what_each_alone_would(seed: int) -> None:
    random_ = random.Random(seed)

    async def session(engine: Engine, name: str, random_: random.Random) -> None:
        rows: Rows = []
        await engine.open(name, 1, 0, timeout=100.0)
        for _ in range(random_.randint(1, 12)):
            start = random_.randint(0, len(rows)) if random_.random() < 0.3 else len(rows)
            new = some_rows(random_.choice([1, 1, 1, 3, 17]), seed=random_.randrange(99))
            rows = rows[:start] + new
            assert await run(engine, name, start, new) == (await expected(rows))[start:]
            await asyncio.sleep(random_.choice([0, 0, 0.1]))
        engine.close_session(name)

    async def scenario() -> None:
        options = {"max_batch_tokens": random_.choice([3, 8, 64])}
        async with running(cache_tokens=random_.choice([600, 2000]), **options) as (engine, executor):
            names = [f"session {n}" for n in range(8)]
            await asyncio.gather(*(session(engine, name, random.Random(f"{seed} {name}")) for name in names))
            assert engine.sessions == 0 and engine.cache_tokens_used == executor.reserved_tokens == 0

    clock.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_clients_that_start_over_all_finish_however_tight_the_cache(seed: int) -> None:
    """Far more sessions than there is room for: none waits for ever, and every answer is right."""

    async def generate(engine: Engine, name: str, rows: Rows, whole: Rows) -> None:
        length = 0
        while length < len(rows):
            count = 9 if length == 0 else 1
            part = rows[length : length + count]
            assert await run(engine, name, length, part) == whole[length : length + count]
            length += len(part)
            await asyncio.sleep(0.05)

    async def client(engine: Engine, random_: random.Random, number: int) -> None:
        rows = some_rows(random_.randint(1, 60), seed=number)
        whole = await expected(rows)
        for attempt in range(200):
            name = f"{number}.{attempt}"
            try:
                await engine.open(name, 1, 9, timeout=20.0)
                await generate(engine, name, rows, whole)
                return
            except CacheFullError as exc:
                assert exc.retry_after < math.inf
                await asyncio.sleep(exc.retry_after)
            except SessionLostError:
                pass
            finally:
                engine.close_session(name)
        raise AssertionError("a client never got through")

    async def scenario() -> None:
        random_ = random.Random(seed)
        async with running(cache_tokens=100, max_batch_tokens=8, idle_grace=1.0) as (engine, _):
            await asyncio.gather(*(client(engine, random_, number) for number in range(12)))
            assert engine.sessions == 0 and engine.cache_tokens_used == 0

    clock.run(scenario())

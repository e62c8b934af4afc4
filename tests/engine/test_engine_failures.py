"""Steps that fail hurt nobody else, and leave their session as it was."""

from __future__ import annotations

import asyncio
import math

import pytest
from counting_engine import WIDTH, expected, run, running, some_rows, submit

from swarmcore.errors import CacheFullError, DeadlineExceededError, InvalidStepError, RemoteFaultError
from swarmcore.testing import clock
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.wire.tensors import Tensor


async def test_bad_values_hurt_nobody_else_and_leave_the_session_as_it_was() -> None:
    async with running() as (engine, _):
        rows = some_rows(5)
        for name in "ab":
            await engine.open(name, 1, 0, timeout=1.0)
            await run(engine, name, 0, rows[:4])
        bad, fine = submit(engine, "a", 4, [[math.nan] * WIDTH]), submit(engine, "b", 4, rows[4:])
        with pytest.raises(InvalidStepError, match="not finite"):
            await bad
        assert read_rows(await fine) == (await expected(rows))[4:]
        assert engine.length("a") == (4,)
        assert await run(engine, "a", 4, rows[4:]) == (await expected(rows))[4:]


async def test_steps_that_build_on_a_failed_one_fail_like_it() -> None:
    async with running() as (engine, _):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, rows[:2])
        failed = submit(engine, "a", 2, [[math.nan] * WIDTH] * 2)
        orphans = [submit(engine, "a", 4, rows[4:5]), submit(engine, "a", 5, rows[5:])]
        rollback = submit(engine, "a", 1, rows[1:])
        for answer in (failed, *orphans):
            with pytest.raises(InvalidStepError, match="not finite"):
                await answer
        with pytest.raises(
            InvalidStepError, match="an earlier step of the session, which this one builds on"
        ):
            await orphans[0]
        # What was in line behind them and does not need them is computed.
        assert read_rows(await rollback) == (await expected(rows))[1:]
        assert engine.length("a") == (6,)


async def test_a_long_step_that_fails_half_way_leaves_nothing_behind() -> None:
    async with running(max_batch_tokens=4) as (engine, executor):
        rows = some_rows(14)
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, rows[:6])
        used = engine.cache_tokens_used
        with pytest.raises(InvalidStepError, match="not finite"):
            await submit(engine, "a", 4, [*rows[4:12], [math.nan] * WIDTH])
        # The step had rolled the sequence back to where it starts.
        assert engine.length("a") == (4,)
        assert engine.cache_tokens_used <= used and executor.reserved_tokens <= used
        assert await run(engine, "a", 4, rows[4:]) == (await expected(rows))[4:]


async def test_a_failing_executor_fails_its_batch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (engine, executor):
        rows = some_rows(2)
        await engine.open("a", 1, 0, timeout=1.0)
        executor.failures.append(ValueError("secret detail"))
        with pytest.raises(RemoteFaultError, match=r"executor failed \(ValueError\); its log"):
            await submit(engine, "a", 0, rows)
        assert "secret detail" in caplog.text
        executor.failures.append(CacheFullError("out of memory", retry_after=3.0))
        with pytest.raises(CacheFullError) as caught:
            await submit(engine, "a", 0, rows)
        assert caught.value.retry_after == 3.0
        assert await run(engine, "a", 0, rows) == await expected(rows)
        assert engine.stats.steps_failed == 2


async def test_a_result_that_cannot_be_encoded_fails_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(max_batch_tokens=4) as (engine, executor):
        rows = some_rows(6)
        await engine.open("a", 1, 0, timeout=1.0)

        async def encode(tensor: Tensor, codec: str) -> Tensor:
            raise MemoryError

        monkeypatch.setattr(executor, "encode", encode)
        with pytest.raises(RemoteFaultError, match="MemoryError"):
            await engine.step("a", (0,), (6,), hidden_states(rows), codec="raw+zstd", timeout=5.0)
        assert await run(engine, "a", 0, rows) == await expected(rows)


async def test_a_cancelled_step_is_withdrawn() -> None:
    async with running() as (engine, executor):
        rows = some_rows(4)
        executor.gate = asyncio.Event()
        await engine.open("a", 1, 0, timeout=1.0)
        await engine.open("b", 1, 0, timeout=1.0)
        computing = submit(engine, "a", 0, rows[:2])
        while not executor.computing:
            await asyncio.sleep(0)
        queued, behind = submit(engine, "b", 0, rows), submit(engine, "b", 4, rows)
        queued.cancel()
        computing.cancel()
        with pytest.raises(InvalidStepError, match="cancelled by its caller"):
            await behind
        again = submit(engine, "a", 0, rows)
        executor.gate.set()
        assert read_rows(await again) == await expected(rows)
        assert engine.length("b") == (0,)
        assert list(executor.batches) == [(2,), (4,)]


def test_a_step_is_answered_by_its_deadline_even_while_the_executor_hangs() -> None:
    async def scenario() -> None:
        async with running() as (engine, executor):
            rows = some_rows(2)
            executor.gate = asyncio.Event()
            await engine.open("a", 1, 0, timeout=1.0)
            await engine.open("b", 1, 0, timeout=1.0)
            computing = submit(engine, "a", 0, rows, timeout=5.0)
            await asyncio.sleep(1.0)
            queued = submit(engine, "b", 0, rows, timeout=2.0)
            for answer, end in ((queued, 3.0), (computing, 5.0)):
                with pytest.raises(DeadlineExceededError, match="2 tokens was not computed by its deadline"):
                    await answer
                assert asyncio.get_running_loop().time() == pytest.approx(end)
            later = submit(engine, "b", 0, rows, timeout=10.0)
            executor.gate.set()
            assert read_rows(await later) == await expected(rows)
            assert await run(engine, "a", 0, rows) == await expected(rows)

    clock.run(scenario())

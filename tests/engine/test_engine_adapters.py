"""Sessions with adapters in an engine: their results, and the room that prefixes take."""

from __future__ import annotations

import pytest
from counting_engine import run, running, some_rows, submit
from small_adapters import adapter_tensors

from swarmcore.errors import CacheFullError
from swarmcore.executor.base import Adapter, ScheduledChunk, Segment, SequenceId
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.rows import Rows, hidden_states, read_rows
from swarmcore.wire.tensors import Tensor


async def expected(rows: Rows, adapter: Adapter | None) -> Rows:
    executor = CountingExecutor()
    executor.reserve(SequenceId(0), 64)
    segments = (Segment(SequenceId(0), 0, len(rows)),)
    [result] = await executor.step(
        [ScheduledChunk(hidden_states(rows), 0, executor.span, segments, adapter=adapter)]
    )
    assert isinstance(result, Tensor)
    return read_rows(result)


async def test_each_session_of_a_batch_is_computed_with_its_own() -> None:
    async with running(max_batch_tokens=8) as (engine, executor):
        adapters = [None, *[await executor.load_adapter(adapter_tensors(seed), 1.0) for seed in (1, 2)]]
        rows = some_rows(20)
        for number, adapter in enumerate(adapters):
            await engine.open(str(number), 1, 0, timeout=1.0, adapter=adapter)
        steps = [submit(engine, str(number), 0, rows) for number in range(3)]
        results = [read_rows(await step) for step in steps]
        assert results == [await expected(rows, adapter) for adapter in adapters]
        assert max(len(batch) for batch in executor.batches) > 1


async def test_prefixes_take_room_in_every_sequence() -> None:
    async with running(cache_tokens=40) as (engine, executor):
        adapter = await executor.load_adapter(adapter_tensors(prefix=5), 1.0)
        await engine.open("a", 2, 0, timeout=1.0, adapter=adapter)
        both = engine.step("a", (0, 0), (3, 4), hidden_states(some_rows(7)), timeout=1.0)
        await both
        assert engine.length("a") == (3, 4)
        # 8 and 9 positions, in whole pages of 4.
        assert engine.cache_tokens_used == executor.reserved_tokens == 8 + 12
        with pytest.raises(CacheFullError):
            await engine.open("b", 1, 16, timeout=0.01, adapter=adapter)
        await engine.open("c", 1, 12, timeout=0.01, adapter=None)


async def test_a_sequence_that_is_rolled_back_to_its_start_gives_its_prefix_back() -> None:
    async with running(cache_tokens=40) as (engine, executor):
        adapter = await executor.load_adapter(adapter_tensors(prefix=5), 1.0)
        await engine.open("a", 1, 0, timeout=1.0, adapter=adapter)
        await run(engine, "a", 0, some_rows(9))
        assert engine.cache_tokens_used == 16
        assert await run(engine, "a", 0, some_rows(2)) == await expected(some_rows(2), adapter)
        assert engine.cache_tokens_used == 8

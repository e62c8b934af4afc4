"""An engine on a counting executor, and what it should answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from swarmcore.engine.engine import Engine
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.testing.executor import CountingExecutor, Rows, hidden_states, read_rows
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

WIDTH = 4


@asynccontextmanager
async def running(
    *, cache_tokens: int = 400, page: int = 4, **options: Any
) -> AsyncIterator[tuple[Engine, CountingExecutor]]:
    executor = CountingExecutor(page=page, tokens=cache_tokens)
    engine = Engine(executor, cache_tokens=cache_tokens, **options)
    await engine.start()
    try:
        yield engine, executor
    finally:
        await engine.close()
        await executor.close()
    assert executor.reserved_tokens == 0


def some_rows(count: int, seed: int = 0) -> Rows:
    random_ = random.Random(seed)
    return read_rows(hidden_states([[random_.uniform(-1, 1) for _ in range(WIDTH)] for _ in range(count)]))


async def expected(rows: Rows, span: Span | None = None) -> Rows:
    """What a sequence of these rows gives when nothing else happens."""
    executor = CountingExecutor()
    executor.reserve(SequenceId(0), 4 * len(rows))
    segments = (Segment(SequenceId(0), 0, len(rows)),)
    [result] = await executor.step([ScheduledChunk(hidden_states(rows), 0, span or executor.span, segments)])
    assert isinstance(result, Tensor)
    return read_rows(result)


def submit(
    engine: Engine, session: str, start: int, rows: Rows, *, timeout: float = 10.0
) -> asyncio.Future[Tensor]:
    return engine.step(session, (start,), (len(rows),), hidden_states(rows), timeout=timeout)


def submit_beams(
    engine: Engine,
    session: str,
    starts: Sequence[int],
    rows: Sequence[Rows],
    sources: Sequence[int] = (),
    *,
    timeout: float = 10.0,
) -> asyncio.Future[Tensor]:
    """A step of a session of several sequences, ``rows[i]`` for sequence ``i``."""
    hidden = hidden_states([row for each in rows for row in each])
    lengths = [len(each) for each in rows]
    return engine.step(session, starts, lengths, hidden, timeout=timeout, sources=sources)


async def run(engine: Engine, session: str, start: int, rows: Rows) -> Rows:
    return read_rows(await submit(engine, session, start, rows))

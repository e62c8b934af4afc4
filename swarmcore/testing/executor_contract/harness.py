"""An executor for a test, fed as an engine would."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import attrs
import pytest

from swarmcore.errors import SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.testing.executor import Rows, hidden_states, read_rows
from swarmcore.types import Span


@attrs.define
class Driver:
    """Feeds an executor as an engine would: reserves, and keeps count of the positions."""

    executor: BlockExecutor
    lengths: dict[int, int] = attrs.field(factory=dict)

    def part(
        self,
        sequence: int,
        rows: Sequence[Sequence[float]],
        *,
        start: int | None = None,
        reply: Literal["all", "last"] = "all",
        span: Span | None = None,
    ) -> ScheduledChunk:
        start = self.lengths.get(sequence, 0) if start is None else start
        self.lengths[sequence] = start + len(rows)
        page = self.executor.page
        self.executor.reserve(SequenceId(sequence), -(-self.lengths[sequence] // page) * page)
        segment = Segment(SequenceId(sequence), start, len(rows))
        return ScheduledChunk(hidden_states(rows), 0, span or self.executor.span, (segment,), reply)

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Room for sequences that come to such lengths by other ways than steps."""
        page = self.executor.page
        for sequence, length in lengths.items():
            self.lengths[sequence] = length
            self.executor.reserve(SequenceId(sequence), -(-length // page) * page)

    async def run(self, *parts: ScheduledChunk) -> list[Rows]:
        answers = []
        for result in await self.executor.step(parts):
            if isinstance(result, SwarmError):
                raise result
            answers.append(read_rows(result))
        return answers

    async def one(self, sequence: int, rows: Rows, *, start: int | None = None) -> Rows:
        return (await self.run(self.part(sequence, rows, start=start)))[0]


class ExecutorHarness(ABC):
    """How the contract reaches a backend: every test gets executors of its own and closes them."""

    pytestmark = pytest.mark.asyncio

    tolerance = 1e-4
    """How far two results that should be equal may differ; 0 for exact arithmetic."""
    large_step = 64
    """Tokens of a step that keeps the executor busy for a while, for the test of the event loop."""

    @abstractmethod
    async def make(self) -> BlockExecutor:
        """A new executor of at least two blocks, in float32."""

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[Driver]:
        executor = await self.make()
        try:
            yield Driver(executor)
        finally:
            await executor.close()

    def rows(self, driver: Driver, count: int, seed: int = 0) -> Rows:
        random_ = random.Random(seed)
        width = driver.executor.model.hidden_size
        return [[random_.uniform(-1, 1) for _ in range(width)] for _ in range(count)]

    def same(self, got: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
        assert [len(row) for row in got] == [len(row) for row in expected]
        errors = [
            abs(a - b)
            for row, other in zip(got, expected, strict=True)
            for a, b in zip(row, other, strict=True)
        ]
        assert max(errors, default=0.0) <= self.tolerance

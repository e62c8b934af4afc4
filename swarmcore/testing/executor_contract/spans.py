"""Contract: the span changes, and what stays goes on."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import SpanError
from swarmcore.executor.base import SequenceId
from swarmcore.testing.executor_contract.harness import ExecutorHarness
from swarmcore.types import Span


class SpansContract(ExecutorHarness):
    async def test_a_span_made_of_pieces_equals_one_loaded_whole(self) -> None:
        async with self.driver() as whole, self.driver() as moved:
            span = whole.executor.span
            rows, tail = self.rows(whole, 6), self.rows(whole, 1, seed=1)
            for on_the_way in (Span(span.start + 1, span.end), Span(span.end - 1, span.end), span):
                await moved.executor.change_span(on_the_way)
                assert moved.executor.span == on_the_way
            assert moved.executor.cache_bytes_per_token == whole.executor.cache_bytes_per_token
            assert await moved.one(0, rows) == await whole.one(0, rows)
            assert await moved.one(0, tail) == await whole.one(0, tail)
            assert await moved.one(0, tail, start=3) == await whole.one(0, tail, start=3)

    async def test_sequences_through_blocks_that_stay_go_on(self) -> None:
        async with self.driver() as driver:
            span = driver.executor.span
            stays = Span(span.start + 1, span.end)
            rows = self.rows(driver, 7)
            [expected] = await driver.run(driver.part(0, rows, span=stays))
            got = (await driver.run(driver.part(1, rows[:3], span=stays)))[0]
            for new in (stays, Span(0, stays.end), stays, span):
                await driver.executor.change_span(new)
                position = driver.lengths[1]
                got += (await driver.run(driver.part(1, rows[position : position + 1], span=stays)))[0]
            self.same(got, expected)

    async def test_steps_run_while_the_span_changes(self) -> None:
        async with self.driver() as driver:
            span = driver.executor.span
            stays = Span(span.start + 1, span.end)
            rows = self.rows(driver, 6)
            [expected] = await driver.run(driver.part(0, rows, span=stays))
            changing = asyncio.ensure_future(driver.executor.change_span(Span(0, stays.end)))
            got = [(await driver.run(driver.part(1, [row], span=stays)))[0][0] for row in rows]
            await changing
            self.same(got, expected)

    async def test_a_span_that_has_nothing_of_the_old_one(self) -> None:
        async with self.driver() as driver, self.driver() as other:
            span = driver.executor.span
            last = Span(span.end - 1, span.end)
            await driver.executor.change_span(Span(0, 1))
            assert driver.executor.span == Span(0, 1)
            await driver.one(0, self.rows(driver, 2))
            driver.executor.release(SequenceId(0))
            await driver.executor.change_span(last)
            rows = self.rows(driver, 3)
            assert [await driver.one(1, rows)] == await other.run(other.part(1, rows, span=last))

    async def test_a_span_outside_the_model_is_refused(self) -> None:
        async with self.driver() as driver:
            before = driver.executor.span
            for span in (Span(0, driver.executor.model.blocks + 1), Span(-1, 2), Span(2, 2)):
                with pytest.raises(SpanError):
                    await driver.executor.change_span(span)
            assert driver.executor.span == before
            await driver.one(0, self.rows(driver, 1))

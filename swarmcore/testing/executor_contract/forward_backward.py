"""Contract: forward and backward passes of whole sequences; backends that run none skip it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from swarmcore.errors import AdapterError, InvalidBatchError, SpanError
from swarmcore.executor.base import BackwardPass, ForwardPass, TrainingBatch
from swarmcore.testing.executor import Rows, hidden_states, read_rows
from swarmcore.testing.executor_contract.harness import Driver, ExecutorHarness
from swarmcore.types import ADAPTERS, TRAINING, Numerics, Span

Work = TypeVar("Work", ForwardPass, BackwardPass)

LENGTHS = (5, 5, 1, 7)

DIFFERENCE = 1e-2
"""How far inputs are moved to see how outputs follow."""


class ForwardBackwardContract(ExecutorHarness):
    slope_tolerance = 2e-2
    """How far a gradient may be from the slope that is seen between two forward passes, relatively."""

    @asynccontextmanager
    async def passes(self) -> AsyncIterator[Driver]:
        async with self.driver() as driver:
            if TRAINING not in driver.executor.capabilities:
                pytest.skip("this backend runs no passes")
            yield driver

    def batch(
        self,
        driver: Driver,
        rows: Rows,
        lengths: Sequence[int] = LENGTHS,
        *,
        span: Span | None = None,
        reproducible: bool = False,
    ) -> TrainingBatch:
        span = span or driver.executor.span
        return TrainingBatch(span, tuple(lengths), hidden_states(rows), reproducible=reproducible)

    async def out(self, driver: Driver, batch: TrainingBatch, max_tokens: int = 1000) -> Rows:
        forward = await _through(driver.executor.forward(batch), max_tokens)
        forward.close()
        return read_rows(forward.outputs)

    async def back(
        self, driver: Driver, batch: TrainingBatch, gradients: Rows, max_tokens: int = 1000
    ) -> Rows:
        backward = driver.executor.backward(batch, hidden_states(gradients))
        await _through(backward, max_tokens)
        backward.close()
        assert backward.gradients is not None and not backward.weights
        return read_rows(backward.gradients)

    async def test_what_it_cannot_do_is_refused(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            assert Numerics.parse(str(executor.numerics)) == executor.numerics
            assert executor.capabilities <= {TRAINING, ADAPTERS}
            if TRAINING not in executor.capabilities:
                batch = self.batch(driver, self.rows(driver, sum(LENGTHS)))
                with pytest.raises(InvalidBatchError):
                    executor.forward(batch)
                with pytest.raises(InvalidBatchError):
                    executor.backward(batch, batch.hidden)
            if ADAPTERS not in executor.capabilities:
                with pytest.raises(AdapterError):
                    await executor.load_adapter([], 1.0)

    async def test_results_have_the_shape_and_dtype_announced(self) -> None:
        async with self.passes() as driver:
            rows = self.rows(driver, sum(LENGTHS))
            batch = self.batch(driver, rows)
            forward = await _through(driver.executor.forward(batch), 1000)
            backward = await _through(driver.executor.backward(batch, hidden_states(rows)), 1000)
            for result in (forward.outputs, backward.gradients):
                assert result is not None and result.codec == "raw"
                assert result.dtype == driver.executor.dtype
                assert result.shape == (len(rows), driver.executor.model.hidden_size)
                assert all(math.isfinite(value) for row in read_rows(result) for value in row)
            forward.close()
            backward.close()

    async def test_a_batch_equals_its_sequences_one_by_one(self) -> None:
        async with self.passes() as driver:
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            outputs, inputs = [], []
            for first, length in zip(_firsts(LENGTHS), LENGTHS, strict=True):
                alone = self.batch(driver, rows[first : first + length], (length,))
                outputs += await self.out(driver, alone)
                inputs += await self.back(driver, alone, gradients[first : first + length])
            batch = self.batch(driver, rows)
            for max_tokens in (1, 6, 1000):
                self.same(await self.out(driver, batch, max_tokens), outputs)
                self.same(await self.back(driver, batch, gradients, max_tokens), inputs)

    async def test_gradients_are_the_slope_of_the_outputs(self) -> None:
        async with self.passes() as driver:
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            direction = self.rows(driver, sum(LENGTHS), seed=2)
            seen = []
            for sign in (1, -1):
                moved = [
                    [x + sign * DIFFERENCE * d for x, d in zip(row, step, strict=True)]
                    for row, step in zip(rows, direction, strict=True)
                ]
                seen.append(_product(await self.out(driver, self.batch(driver, moved)), gradients))
            slope = (seen[0] - seen[1]) / (2 * DIFFERENCE)
            found = _product(await self.back(driver, self.batch(driver, rows), gradients), direction)
            assert found == pytest.approx(slope, rel=self.slope_tolerance)

    async def test_a_span_in_two_parts_equals_the_whole_forward_and_back(self) -> None:
        async with self.passes() as driver:
            span = driver.executor.span
            parts = Span(span.start, span.start + 1), Span(span.start + 1, span.end)
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            first = self.batch(driver, rows, span=parts[0])
            second = self.batch(driver, await self.out(driver, first), span=parts[1])
            whole = self.batch(driver, rows)
            self.same(await self.out(driver, second), await self.out(driver, whole))
            between = await self.back(driver, second, gradients)
            self.same(await self.back(driver, first, between), await self.back(driver, whole, gradients))

    async def test_kept_activations_change_no_gradient(self) -> None:
        async with self.passes() as driver:
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            batch = self.batch(driver, rows)
            expected = await self.back(driver, batch, gradients)
            forward = await _through(driver.executor.forward(batch, keep=True), 6)
            assert forward.kept_bytes > 0
            with pytest.raises(InvalidBatchError):
                driver.executor.backward(batch, hidden_states(gradients[1:]), kept=forward)
            backward = driver.executor.backward(batch, hidden_states(gradients), kept=forward)
            await _through(backward, 4)
            backward.close()
            assert backward.gradients is not None
            self.same(read_rows(backward.gradients), expected)

    async def test_reproducible_batches_do_not_depend_on_units(self) -> None:
        async with self.passes() as driver:
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            batch = self.batch(driver, rows, reproducible=True)
            outputs = [await self.out(driver, batch, max_tokens) for max_tokens in (1, 11, 1000)]
            inputs = [await self.back(driver, batch, gradients, max_tokens) for max_tokens in (1, 11, 1000)]
            assert outputs[0] == outputs[1] == outputs[2]
            assert inputs[0] == inputs[1] == inputs[2]

    async def test_encoded_rows_are_decoded(self) -> None:
        async with self.passes() as driver:
            rows, gradients = self.rows(driver, sum(LENGTHS)), self.rows(driver, sum(LENGTHS), seed=1)
            batch = self.batch(driver, rows)
            expected = await self.back(driver, batch, gradients)
            batch.hidden = batch.hidden.encode("raw+zstd")
            given = hidden_states(gradients).encode("raw+zstd")
            backward = await _through(driver.executor.backward(batch, given), 1000)
            backward.close()
            assert backward.gradients is not None
            self.same(read_rows(backward.gradients), expected)

    async def test_steps_go_in_between_units(self) -> None:
        async with self.passes() as driver:
            prompt, tail = self.rows(driver, 4, seed=3), self.rows(driver, 2, seed=4)
            alone = await driver.one(0, prompt) + await driver.one(0, tail)
            rows = self.rows(driver, sum(LENGTHS))
            expected = await self.out(driver, self.batch(driver, rows))
            stepped = await driver.one(1, prompt)
            forward = driver.executor.forward(self.batch(driver, rows), keep=True)
            assert not await forward.advance(1)
            stepped += await driver.one(1, tail)
            await _through(forward, 1)
            self.same(stepped, alone)
            self.same(read_rows(forward.outputs), expected)
            forward.close()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    async def test_values_that_are_not_finite_end_the_pass_alone(self, bad: float) -> None:
        async with self.passes() as driver:
            rows = self.rows(driver, sum(LENGTHS))
            poisoned = [*rows[:-1], [bad] * len(rows[0])]
            batch = self.batch(driver, rows)
            expected = await self.out(driver, batch)
            with pytest.raises(InvalidBatchError):
                await self.out(driver, self.batch(driver, poisoned))
            with pytest.raises(InvalidBatchError):
                await self.back(driver, batch, poisoned)
            self.same(await self.out(driver, batch), expected)

    async def test_batches_that_do_not_fit_are_refused(self) -> None:
        async with self.passes() as driver:
            executor, rows = driver.executor, self.rows(driver, 5)
            with pytest.raises(InvalidBatchError):
                await self.out(driver, self.batch(driver, rows, (2, 2)))
            with pytest.raises(InvalidBatchError):
                await self.out(driver, self.batch(driver, [row[1:] for row in rows], (5,)))
            with pytest.raises(InvalidBatchError):
                await self.back(driver, self.batch(driver, rows, (5,)), rows[1:])
            outside = Span(executor.span.start, executor.model.blocks + 1)
            with pytest.raises(SpanError):
                await self.out(driver, self.batch(driver, rows, (5,), span=outside))

    async def test_a_pass_is_closed_at_any_time(self) -> None:
        async with self.passes() as driver:
            rows = self.rows(driver, sum(LENGTHS))
            batch = self.batch(driver, rows)
            for units in range(4):
                for work in (
                    driver.executor.forward(batch, keep=True),
                    driver.executor.backward(batch, hidden_states(rows)),
                ):
                    for _ in range(units):
                        assert not await work.advance(1)
                    work.close()
                    work.close()
            self.same(await self.out(driver, batch), await self.out(driver, batch, 1))


async def _through(work: Work, max_tokens: int) -> Work:
    while not await work.advance(max_tokens):
        pass
    return work


def _firsts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _product(rows: Rows, others: Rows) -> float:
    return sum(
        a * b for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True)
    )

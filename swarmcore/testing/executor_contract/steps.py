"""Contract: steps give what they should, however they are cut, batched and rolled back.

And when the span changes, what stays goes on.
"""

from __future__ import annotations

import asyncio
import math

import pytest

from swarmcore.errors import InvalidStepError, SpanError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, SequenceId
from swarmcore.testing.executor import hidden_states, read_rows
from swarmcore.testing.executor_contract.harness import ExecutorHarness
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

LONGEST_BLOCK = 0.05
"""Seconds for which a step may keep the event loop from running anything else."""


class StepsContract(ExecutorHarness):
    async def test_describes_itself(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            assert executor.model.span.covers(executor.span)
            assert executor.page > 0 and executor.cache_bytes_per_token > 0
            assert executor.dtype in ("float32", "float16", "bfloat16")

    async def test_a_result_has_the_shape_and_dtype_announced(self) -> None:
        async with self.driver() as driver:
            [result] = await driver.executor.step([driver.part(0, self.rows(driver, 3))])
            assert isinstance(result, Tensor)
            assert (result.name, result.dtype) == ("hidden", driver.executor.dtype)
            assert result.shape == (3, driver.executor.model.hidden_size)
            assert all(math.isfinite(value) for row in read_rows(result) for value in row)

    async def test_chunks_equal_the_whole(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 11)
            whole = await driver.one(0, rows)
            chunks = [
                row for cut in ((0, 5), (5, 6), (6, 11)) for row in await driver.one(1, rows[slice(*cut)])
            ]
            self.same(chunks, whole)

    async def test_single_tokens_equal_the_whole(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 6)
            whole = await driver.one(0, rows)
            self.same([(await driver.one(1, [row]))[0] for row in rows], whole)

    async def test_a_batch_equals_one_by_one(self) -> None:
        async with self.driver() as driver:
            prompts = [self.rows(driver, n, seed=n) for n in (7, 1, 4)]
            alone = [await driver.one(n, rows) for n, rows in enumerate(prompts)]
            alone_next = [await driver.one(n, self.rows(driver, 1, seed=9)) for n in range(3)]
            together = await driver.run(*(driver.part(10 + n, rows) for n, rows in enumerate(prompts)))
            # Decode steps and a new prefill in one batch, the sequences in another order.
            late = [driver.part(n, self.rows(driver, 1, seed=9)) for n in (12, 10, 11)]
            after = await driver.run(late[0], driver.part(20, prompts[0]), late[1], late[2])
            for got, expected in zip(together, alone, strict=True):
                self.same(got, expected)
            for got, expected in zip(
                after, [alone_next[2], alone[0], alone_next[0], alone_next[1]], strict=True
            ):
                self.same(got, expected)

    async def test_several_sequences_in_one_slice(self) -> None:
        async with self.driver() as driver:
            first, second = self.rows(driver, 3, seed=1), self.rows(driver, 2, seed=2)
            expected = await driver.one(0, first) + await driver.one(1, second)
            parts = driver.part(2, first), driver.part(3, second)
            segments = tuple(part.segments[0] for part in parts)
            both = ScheduledChunk(hidden_states(first + second), 0, driver.executor.span, segments)
            self.same((await driver.run(both))[0], expected)

    async def test_a_slice_uses_only_its_own_rows(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 6)
            expected = await driver.one(0, rows)
            first, second = driver.part(1, rows[:4]), driver.part(1, rows[4:])
            step = hidden_states(rows)
            first.hidden, second.hidden, second.first_row = step, step, 4
            got = (await driver.run(first))[0] + (await driver.run(second))[0]
            self.same(got, expected)

    async def test_reply_last_is_the_last_row_of_each_segment(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 5)
            expected = await driver.one(0, rows)
            [last] = await driver.run(driver.part(1, rows, reply="last"))
            self.same(last, expected[-1:])

    async def test_rollback_is_exact(self) -> None:
        async with self.driver() as driver:
            rows, other = self.rows(driver, 9), self.rows(driver, 4, seed=1)
            expected = await driver.one(0, rows[:5] + other)
            await driver.one(1, rows)
            self.same(await driver.one(1, other, start=5), expected[5:])
            # And back to the very start.
            self.same(await driver.one(1, rows[:5], start=0), expected[:5])

    async def test_rollback_of_one_sequence_leaves_the_others(self) -> None:
        async with self.driver() as driver:
            rows, tail = self.rows(driver, 6), self.rows(driver, 2, seed=1)
            expected = await driver.one(0, rows + tail)
            await driver.run(driver.part(1, rows), driver.part(2, rows))
            await driver.run(driver.part(1, tail, start=2))
            self.same(await driver.one(2, tail), expected[6:])

    async def test_drafts_of_which_a_part_is_kept(self) -> None:
        """Several sequences at once, each of which rolls back as far as it has to."""
        async with self.driver() as driver:
            kept = [self.rows(driver, n, seed=n) for n in (6, 1, 3)]
            await driver.run(*(driver.part(n, rows) for n, rows in enumerate(kept)))
            for turn, counts in enumerate([(0, 2, 4), (4, 0, 1), (2, 3, 4)]):
                drafts = [self.rows(driver, 4, seed=10 * turn + n) for n in range(3)]
                got = await driver.run(*(driver.part(n, drafts[n], start=len(kept[n])) for n in range(3)))
                for n, count in enumerate(counts):
                    whole = await driver.one(100 + 3 * turn + n, kept[n] + drafts[n])
                    self.same(got[n], whole[len(kept[n]) :])
                    kept[n] += drafts[n][:count]

    async def test_a_span_in_two_parts_equals_the_whole(self) -> None:
        async with self.driver() as driver:
            span = driver.executor.span
            middle = (span.start + span.end) // 2
            rows = self.rows(driver, 5)
            expected = await driver.one(0, rows)
            [between] = await driver.run(driver.part(1, rows, span=Span(span.start, middle)))
            [after] = await driver.run(driver.part(2, between, span=Span(middle, span.end)))
            self.same(after, expected)

    async def test_released_sequences_are_forgotten(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 4)
            expected = await driver.one(0, rows)
            driver.executor.release(SequenceId(0))
            driver.executor.release(SequenceId(0))
            driver.executor.release(SequenceId(77))
            self.same(await driver.one(1, rows), expected)

    async def test_release_while_others_compute(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 4)
            expected = await driver.one(0, rows)
            await driver.one(1, rows)
            running = asyncio.ensure_future(driver.run(driver.part(2, rows)))
            await asyncio.sleep(0)
            driver.executor.release(SequenceId(1))
            driver.executor.reserve(SequenceId(3), driver.executor.page)
            self.same((await running)[0], expected)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    async def test_bad_values_hurt_only_their_slice(self, bad: float) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 3)
            expected, then = await driver.one(0, rows), await driver.one(0, rows)
            await driver.one(2, rows)
            poisoned = [*rows[:2], [bad] * len(rows[0])]
            parts = driver.part(1, rows), driver.part(2, poisoned), driver.part(3, rows)
            before, error, after = await driver.executor.step(parts)
            assert isinstance(error, InvalidStepError)
            assert isinstance(before, Tensor) and isinstance(after, Tensor)
            self.same(read_rows(before), expected)
            self.same(read_rows(after), expected)
            # The failed sequence goes on from where it was; nothing of the bad values is left in its cache.
            self.same(await driver.one(2, rows, start=3), then)

    async def test_hidden_states_of_other_dtypes_are_converted(self) -> None:
        async with self.driver() as driver:
            rows = [[0.5, -0.25] * (driver.executor.model.hidden_size // 2) for _ in range(2)]
            expected = await driver.one(0, rows)
            for sequence, dtype in enumerate(("float16", "bfloat16"), 1):
                part = driver.part(sequence, rows)
                part.hidden = hidden_states(rows, dtype)
                self.same((await driver.run(part))[0], expected)

    async def test_the_result_is_encoded_as_asked(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 4)
            expected = await driver.one(0, rows)
            part = driver.part(1, rows)
            part.codec, part.hidden = "raw+zstd", part.hidden.encode("raw+zstd")
            [result] = await driver.executor.step([part])
            assert isinstance(result, Tensor) and result.codec == "raw+zstd"
            self.same(read_rows(result), expected)

    async def test_the_event_loop_runs_while_a_step_computes(self) -> None:
        async with self.driver() as driver:
            await driver.one(0, self.rows(driver, 1))
            blocked = []
            for sequence in (1, 2, 3):
                # Other programs can hold the processor too: the best of three tries counts.
                part = driver.part(sequence, self.rows(driver, self.large_step))
                blocked.append(await _longest_block(driver.executor, part))
                if blocked[-1] < LONGEST_BLOCK:
                    break
            assert min(blocked) < LONGEST_BLOCK

    async def test_close_is_harmless_when_repeated(self) -> None:
        async with self.driver() as driver:
            await driver.executor.close()


async def _longest_block(executor: BlockExecutor, part: ScheduledChunk) -> float:
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(executor.step([part]))
    longest, last = 0.0, loop.time()
    while not running.done():
        await asyncio.sleep(0.001)
        now = loop.time()
        longest, last = max(longest, now - last), now
    await running
    return longest


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

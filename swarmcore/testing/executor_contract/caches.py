"""Contract: caches are copied for beams, and go from one executor to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import pytest

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.executor.base import SequenceId
from swarmcore.testing.executor import read_rows
from swarmcore.testing.executor_contract.harness import ExecutorHarness
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


class CachesContract(ExecutorHarness):
    # --- beams -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("sources", [(2, 0, 1), (1, 1, 0), (2, 2, 2), (0, 1, 2), (1, 0, 0)])
    async def test_reordered_sequences_go_on_as_their_sources(self, sources: tuple[int, ...]) -> None:
        async with self.driver() as driver:
            prompts = [self.rows(driver, 4 + n, seed=n) for n in range(3)]
            tails = [self.rows(driver, 2, seed=10 + n) for n in range(3)]
            for n, rows in enumerate(prompts):
                await driver.one(n, rows)
            sequences = [SequenceId(n) for n in range(3)]
            driver.reserve({n: max(len(prompts[n]), len(prompts[at])) for n, at in enumerate(sources)})
            await driver.executor.reorder(sequences, sources)
            for n, source in enumerate(sources):
                got = await driver.one(n, tails[n], start=len(prompts[source]))
                whole = await driver.one(100 + n, prompts[source] + tails[n])
                self.same(got, whole[-2:])

    async def test_copies_part_ways(self) -> None:
        async with self.driver() as driver:
            rows, tails = self.rows(driver, 5), [self.rows(driver, 3, seed=n) for n in (1, 2)]
            await driver.one(0, rows)
            driver.reserve({1: 5})
            await driver.executor.reorder([SequenceId(0), SequenceId(1)], [0, 0])
            # The second rolls back into what both have in common.
            await driver.one(1, tails[1], start=2)
            self.same(await driver.one(0, tails[0]), (await driver.one(2, rows + tails[0]))[5:])
            self.same(
                await driver.one(1, tails[0]), (await driver.one(3, rows[:2] + tails[1] + tails[0]))[5:]
            )

    async def test_sequences_without_a_cache_are_reordered_too(self) -> None:
        async with self.driver() as driver:
            rows = self.rows(driver, 3)
            expected = await driver.one(0, rows)
            driver.reserve({1: 3})
            await driver.executor.reorder([SequenceId(0), SequenceId(1)], [1, 0])
            tail = self.rows(driver, 1, seed=1)
            self.same(await driver.one(1, tail, start=3), (await driver.one(2, rows + tail))[3:])
            self.same(await driver.one(0, rows, start=0), expected)

    # --- prefixes ----------------------------------------------------------------------------------------

    async def test_a_new_sequence_begins_with_the_prefix_of_another(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            if executor.prefix_sharing == "none":
                pytest.skip("this executor shares no prefixes")
            shared = 2 * executor.page
            rows = self.rows(driver, shared + 3)
            tails = [self.rows(driver, 2, seed=n) for n in range(1, 4)]
            await driver.one(0, rows)
            driver.reserve(dict.fromkeys((1, 2), shared))
            for n in (1, 2):
                await executor.share_prefix(SequenceId(0), SequenceId(n), shared)
            # All three write where the others read, or have read.
            got = [await driver.one(n, tails[n]) for n in range(3)]
            self.same(got[0], (await driver.one(10, rows + tails[0]))[-2:])
            for n in (1, 2):
                self.same(got[n], (await driver.one(10 + n, rows[:shared] + tails[n]))[-2:])
            # A rollback into what they share, by the source and by a target.
            for n in (0, 1):
                rolled_back = await driver.one(n, tails[0], start=executor.page + 1)
                whole = await driver.one(20 + n, rows[: executor.page + 1] + tails[0])
                self.same(rolled_back, whole[-2:])
            executor.release(SequenceId(0))
            executor.release(SequenceId(1))
            whole = await driver.one(30, rows[:shared] + tails[2] + tails[1])
            self.same(await driver.one(2, tails[1]), whole[-2:])

    async def test_a_smaller_reservation_leaves_the_prefix(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            if executor.prefix_sharing == "none":
                pytest.skip("this executor shares no prefixes")
            page = executor.page
            rows, tail = self.rows(driver, 2 * page + 3), self.rows(driver, 2, seed=1)
            await driver.one(0, rows)
            driver.reserve({0: page, 1: page})
            with pytest.raises(InvalidStepError):
                await executor.export_cache(SequenceId(0), 0, page + 1)
            await executor.share_prefix(SequenceId(0), SequenceId(1), page)
            self.same(await driver.one(1, tail), (await driver.one(2, rows[:page] + tail))[-2:])

    async def test_prefixes_of_prefixes_of_a_part_of_the_span(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            if executor.prefix_sharing == "none":
                pytest.skip("this executor shares no prefixes")
            part = Span(executor.span.start + 1, executor.span.end)
            rows, tail = self.rows(driver, 2 * executor.page + 1), self.rows(driver, 1, seed=1)
            await driver.run(driver.part(0, rows, span=part))
            for n, pages in ((1, 2), (2, 1)):
                driver.reserve({n: pages * executor.page})
                await executor.share_prefix(SequenceId(n - 1), SequenceId(n), pages * executor.page)
                executor.release(SequenceId(n - 1))
            [got] = await driver.run(driver.part(2, tail, span=part))
            [whole] = await driver.run(driver.part(3, rows[: executor.page] + tail, span=part))
            self.same(got, whole[-1:])

    async def test_sequences_that_share_a_prefix_do_not_notice_each_other(self) -> None:
        """One of them overwrites a part of what they share, fails, or grows, in one batch with the others."""
        async with self.driver() as driver:
            executor = driver.executor
            if executor.prefix_sharing == "none":
                pytest.skip("this executor shares no prefixes")
            shared, odd = 2 * executor.page, executor.page + executor.page // 2
            rows, tail = self.rows(driver, shared + 1), self.rows(driver, 2, seed=1)
            bad = [[math.nan] * len(row) for row in self.rows(driver, 3)]
            await driver.one(0, rows)
            driver.reserve({1: shared, 2: odd})
            await executor.share_prefix(SequenceId(0), SequenceId(1), shared)
            await executor.share_prefix(SequenceId(1), SequenceId(2), odd)
            expected = [
                (await driver.one(10 + n, [*rows[:length], *tail]))[length:]
                for n, length in enumerate((shared + 1, shared, odd))
            ]
            for writer in range(3):
                starts = [shared + 1, shared, odd]
                parts = [driver.part(n, tail[:1], start=start) for n, start in enumerate(starts)]
                parts[writer] = driver.part(writer, bad, start=executor.page - 1)
                results = await executor.step(parts)
                assert isinstance(results[writer], InvalidStepError)
                for n, result in enumerate(results):
                    if n != writer:
                        assert isinstance(result, Tensor)
                        self.same(read_rows(result), expected[n][:1])
                        self.same(await driver.one(n, tail[1:], start=starts[n] + 1), expected[n][1:])
                # It goes on from where it was good, and later has the others' tokens again.
                again = rows[executor.page - 1 : starts[writer]]
                await driver.one(writer, again, start=executor.page - 1)
                self.same(await driver.one(writer, tail), expected[writer])

    async def test_prefixes_that_are_not_there_or_do_not_fit_are_refused(self) -> None:
        async with self.driver() as driver:
            executor = driver.executor
            if executor.prefix_sharing == "none":
                pytest.skip("this executor shares no prefixes")
            page, rows = executor.page, self.rows(driver, executor.page)
            expected = await driver.one(0, rows)
            driver.reserve({1: 2 * page})
            for source, target in ((7, 1), (0, 7)):
                with pytest.raises(SessionLostError):
                    await executor.share_prefix(SequenceId(source), SequenceId(target), page)
            for target, tokens in ((1, page + 1), (1, 0), (1, -1), (0, page)):
                with pytest.raises(InvalidStepError):
                    await executor.share_prefix(SequenceId(0), SequenceId(target), tokens)
            self.same(await driver.one(1, rows, start=0), expected)

    # --- caches that come and go -------------------------------------------------------------------------

    async def test_a_cache_goes_from_one_executor_to_another(self) -> None:
        async with self.driver() as old, self.driver() as new:
            rows, tail = self.rows(old, 9), self.rows(old, 3, seed=1)
            await old.one(0, rows)
            span = old.executor.span
            for start, count in ((0, 4), (4, 1), (5, 4)):
                tensors = await old.executor.export_cache(SequenceId(0), start, count)
                size = sum(tensor.data.nbytes for tensor in tensors)
                assert size == count * old.executor.cache_bytes_per_token
                new.reserve({7: start + count})
                await new.executor.import_cache(SequenceId(7), span, start, count, tensors)
            assert await new.one(7, tail) == await old.one(0, tail)
            # A step that rolls back, and an import that does.
            assert await new.one(7, tail, start=2) == await old.one(0, tail, start=2)
            tensors = await old.executor.export_cache(SequenceId(0), 1, 3)
            await new.executor.import_cache(SequenceId(7), span, 1, 3, tensors)
            assert await new.one(7, tail, start=4) == await old.one(0, tail, start=4)

    async def test_an_exported_cache_stays_what_it_was(self) -> None:
        async with self.driver() as driver:
            await driver.one(0, self.rows(driver, 3))
            before = await driver.executor.export_cache(SequenceId(0), 0, 3)
            bytes_before = [bytes(tensor.data) for tensor in before]
            await driver.one(0, self.rows(driver, 3, seed=1), start=0)
            assert [bytes(tensor.data) for tensor in before] == bytes_before

    async def test_the_cache_of_a_part_of_the_span(self) -> None:
        async with self.driver() as old, self.driver() as new:
            part = Span(old.executor.span.start, old.executor.span.end - 1)
            rows, tail = self.rows(old, 4), self.rows(old, 1, seed=1)
            await old.run(old.part(0, rows, span=part))
            tensors = await old.executor.export_cache(SequenceId(0), 0, 4)
            new.reserve({0: 4})
            await new.executor.import_cache(SequenceId(0), part, 0, 4, tensors)
            assert await new.run(new.part(0, tail, span=part)) == await old.run(old.part(0, tail, span=part))

    async def test_caches_that_do_not_fit_are_refused(self) -> None:
        async with self.driver() as driver:
            executor, span = driver.executor, driver.executor.span
            rows = self.rows(driver, 4)
            expected = await driver.one(0, rows)
            tensors = await executor.export_cache(SequenceId(0), 0, 4)
            part = Span(span.start, span.end - 1)
            one = tensors[0]
            driver.reserve({1: 8})
            wrong: list[tuple[Span, int, int, Sequence[Tensor]]] = [
                (part, 0, 4, tensors),
                (span, 0, 3, tensors),
                (span, 1, 4, tensors),
                (span, 0, 4, tensors[1:]),
                (span, 0, 4, (*tensors, one)),
                (span, 0, 4, (attrs.evolve(one, name="other"), *tensors[1:])),
                (span, 0, 4, (attrs.evolve(one, dtype="bool"), *tensors[1:])),
                (span, 0, 4, (attrs.evolve(one, data=one.data[:-1]), *tensors[1:])),
                (span, 0, 4, (one.encode("raw+zstd"), *tensors[1:])),
            ]
            for case in wrong:
                with pytest.raises(InvalidStepError):
                    await executor.import_cache(SequenceId(1), *case)
            self.same(await driver.one(1, rows, start=0), expected)

    async def test_what_is_not_cached_cannot_be_exported(self) -> None:
        async with self.driver() as driver:
            await driver.one(0, self.rows(driver, 4))
            for start, count in ((0, 5), (4, 1), (-1, 2), (0, 0)):
                with pytest.raises(InvalidStepError):
                    await driver.executor.export_cache(SequenceId(0), start, count)
            with pytest.raises(SessionLostError):
                await driver.executor.export_cache(SequenceId(1), 0, 1)

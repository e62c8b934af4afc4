"""Batches, one after the other: formed from what waits, reordered, computed, encoded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from swarmcore.engine.batch_window import BatchWindow
from swarmcore.engine.prefill_pacing import PrefillPacing
from swarmcore.engine.scheduler import Batch, Scheduler
from swarmcore.engine.session import SessionStep
from swarmcore.engine.sessions import SessionTable
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training import TrainingRunner
from swarmcore.errors import InternalError, SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, executor_error
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)


class BatchLoop:
    """Runs what the scheduler holds on the executor, and gives the results to the table."""

    def __init__(
        self,
        executor: BlockExecutor,
        table: SessionTable,
        scheduler: Scheduler[SessionStep],
        gathering: BatchWindow,
        stats: EngineStats,
        passes: TrainingRunner,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called after each change of the table."""
        self._passes = passes
        self._executor = executor
        self._table = table
        self._scheduler = scheduler
        self._gathering = gathering
        self._stats = stats
        self._changed = changed
        self._pacing = PrefillPacing()
        self._wake = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """Something may be there to compute."""
        self._wake.set()

    def stop(self) -> None:
        """Let `run` end after the batch that runs."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Compute until it is told to stop."""
        while not self._stopping:
            if not len(self._scheduler) and not self._passes_wait:
                self._wake.clear()
                await self._wake.wait()
            else:
                # Callers just answered run first, so that their next steps join this batch.
                await asyncio.sleep(0)
            if len(self._scheduler):
                await self._run_batch()
            if self._passes_wait and not self._stopping:
                await self._passes.run_unit()
                self._table.worked(_now())

    @property
    def _passes_wait(self) -> bool:
        return len(self._passes.queue) > 0

    async def _run_batch(self) -> None:
        self._passes.pacing.stepped(_now())
        await self._gather()
        self._scheduler.prefill_rows = self._pacing.rows
        batch = self._table.schedule(_now())
        if batch.steps:
            await self._run(batch)
            self._passes.pacing.stepped(_now())
        self._table.poll(_now())
        self._changed()

    async def _gather(self) -> None:
        """Give decode steps that are about to come the time to join the next batch, where that pays."""
        if not (here := self._scheduler.decode_waiting):
            return
        wait = self._gathering.gather(here, self._stats.decode_seconds, _now())
        if wait is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(wait.until):
                while 0 < self._scheduler.decode_waiting < wait.steps and not self._stopping:
                    self._wake.clear()
                    await self._wake.wait()

    async def _run(self, batch: Batch[SessionStep]) -> None:
        started = _now()
        errors = await self._reorder(batch)
        slices = [part for number, part in enumerate(batch.slices) if number not in errors]
        computed = iter(await self._results(slices))
        results = [errors.get(number) or next(computed) for number in range(len(batch.slices))]
        now = _now()
        self._stats.note_batch(batch.tokens, now - started, batch.decode_only)
        self._pacing.note_batch(
            sum(part.tokens for step, part in zip(batch.steps, batch.slices, strict=True) if not step.decode),
            now - started,
            decodes=any(step.decode for step in batch.steps),
            decode_seconds=self._stats.decode_seconds,
            now=now,
        )
        for step in self._table.landed(batch, results, now):
            try:
                encoded = await self._executor.encode(step.result(), step.codec)
            except Exception as exc:
                log.exception("the result of a step cannot be encoded as %s", step.codec)
                self._table.fail(step, executor_error(exc), _now())
            else:
                self._table.complete(step, encoded, _now())
        for step in batch.steps:
            if step.done:
                self._gathering.answered(step.session.name, now)

    async def _reorder(self, batch: Batch[SessionStep]) -> dict[int, SwarmError]:
        """Reorder caches for the steps that begin in this batch and ask for it; errors of those that fail."""
        errors = {}
        for number, (step, part) in enumerate(zip(batch.steps, batch.slices, strict=True)):
            if step.sources and part.first_row == 0:
                try:
                    await self._executor.reorder(step.session.sequences, step.sources)
                except Exception as exc:
                    if not isinstance(exc, SwarmError):
                        log.exception("the executor failed to reorder caches")
                    errors[number] = executor_error(exc)
        return errors

    async def _results(self, slices: Sequence[ScheduledChunk]) -> Sequence[Tensor | SwarmError]:
        if not slices:
            return []
        try:
            results = await self._executor.step(slices)
            if len(results) == len(slices):
                return results
            raise InternalError(f"the executor gave {len(results)} results for {len(slices)} slices")
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                log.exception(
                    "the executor failed on a batch of %d tokens", sum(part.tokens for part in slices)
                )
            # One instance for each step: an exception that is raised in several tasks mixes up tracebacks.
            return [executor_error(exc) for _ in slices]


def _now() -> float:
    return asyncio.get_running_loop().time()

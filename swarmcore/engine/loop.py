"""Batches, one after the other: formed from what waits, reordered, computed, encoded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from swarmcore.engine.batch_window import BatchWindow
from swarmcore.engine.scheduler import PrefillBudget, ScheduledBatch, Scheduler
from swarmcore.engine.session import SessionStep
from swarmcore.engine.session_manager import SessionManager
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training_worker import TrainingWorker
from swarmcore.errors import InternalError, SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, executor_error
from swarmcore.resources.allocator import give_back_memory
from swarmcore.tasks import loop_time
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

QUIET = 2.0
"""Seconds without work after which memory that is free goes back to the system: not between two bursts."""
ROWS_TO_TIDY = 1024
"""Rows computed since the last time, from which on that is worth it."""


class BatchLoop:
    """Runs what the scheduler holds on the executor, and gives the results to the sessions."""

    def __init__(
        self,
        executor: BlockExecutor,
        sessions: SessionManager,
        scheduler: Scheduler[SessionStep],
        window: BatchWindow,
        stats: EngineStats,
        training: TrainingWorker,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called after each change of the sessions."""
        self._training = training
        self._executor = executor
        self._sessions = sessions
        self._scheduler = scheduler
        self._window = window
        self._stats = stats
        self._changed = changed
        self._prefill = PrefillBudget()
        self._wake = asyncio.Event()
        self._stopping = False
        self._rows = 0
        """Computed since memory was last given back."""

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
            if not len(self._scheduler) and not self._training_waits:
                await self._wait_for_work()
            else:
                # Callers just answered run first, so that their next steps join this batch.
                await asyncio.sleep(0)
            if len(self._scheduler):
                await self._run_batch()
            if self._training_waits and not self._stopping:
                await self._training.run_unit()
                self._rows += ROWS_TO_TIDY
                self._sessions.note_progress(loop_time())

    async def _wait_for_work(self) -> None:
        self._wake.clear()
        if self._rows >= ROWS_TO_TIDY:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIET):
                    await self._wake.wait()
                    return
            self._rows = 0
            give_back_memory()
        await self._wake.wait()

    @property
    def _training_waits(self) -> bool:
        return len(self._training.queue) > 0

    async def _run_batch(self) -> None:
        self._training.pacing.stepped(loop_time())
        await self._wait_for_decodes()
        self._scheduler.prefill_rows = self._prefill.rows
        batch = self._sessions.schedule(loop_time())
        if batch.steps:
            await self._run(batch)
            self._training.pacing.stepped(loop_time())
        self._sessions.poll(loop_time())
        self._changed()

    async def _wait_for_decodes(self) -> None:
        """Give decode steps that are about to come the time to join the next batch, where that pays."""
        since = now = loop_time()
        waited_for = None
        while not self._stopping:
            span, here = self._scheduler.decode_waiting
            wait = self._window.wait(here, since, now, span) if here else None
            if wait is None:
                break
            waited_for = here if waited_for is None else waited_for
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(wait.until):
                    while 0 < self._scheduler.decode_waiting[1] < wait.steps and not self._stopping:
                        self._wake.clear()
                        await self._wake.wait()
            now = loop_time()
        if waited_for is not None:
            self._stats.note_window(now - since, self._scheduler.decode_waiting[1] > waited_for, now)

    async def _run(self, batch: ScheduledBatch[SessionStep]) -> None:
        started = loop_time()
        errors = await self._reorder(batch)
        chunks = [chunk for number, chunk in enumerate(batch.chunks) if number not in errors]
        computed = iter(await self._results(chunks))
        results = [errors.get(number) or next(computed) for number in range(len(batch.chunks))]
        now = loop_time()
        self._rows += batch.tokens
        self._stats.note_batch(batch.tokens, now - started, batch.decode_only, now)
        if batch.decode_only:
            self._window.passes.note(len(batch.steps), now - started)
        self._prefill.note_batch(
            batch.prefill_tokens,
            now - started,
            decodes=any(step.decode for step in batch.steps),
            decode_seconds=self._stats.decode_seconds,
            now=now,
        )
        for step in self._sessions.finish_batch(batch, results, now):
            try:
                encoded = await self._executor.encode(step.result(), step.codec)
            except Exception as exc:
                log.exception("the result of a step cannot be encoded as %s", step.codec)
                self._sessions.fail(step, executor_error(exc), loop_time())
            else:
                self._sessions.complete(step, encoded, loop_time())
        for step in batch.steps:
            if step.done and not step.session.queue:  # else its next one is here
                self._window.answered(step.session.name, now)

    async def _reorder(self, batch: ScheduledBatch[SessionStep]) -> dict[int, SwarmError]:
        """Reorder caches for the steps that begin in this batch and ask for it; errors of those that fail."""
        errors = {}
        for number, (step, chunk) in enumerate(zip(batch.steps, batch.chunks, strict=True)):
            if step.sources and chunk.first_row == 0:
                try:
                    await self._executor.reorder(step.session.sequences, step.sources)
                except Exception as exc:
                    if not isinstance(exc, SwarmError):
                        log.exception("the executor failed to reorder caches")
                    errors[number] = executor_error(exc)
        return errors

    async def _results(self, chunks: Sequence[ScheduledChunk]) -> Sequence[Tensor | SwarmError]:
        if not chunks:
            return []
        try:
            results = await self._executor.step(chunks)
            if len(results) == len(chunks):
                return results
            raise InternalError(f"the executor gave {len(results)} results for {len(chunks)} chunks")
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                log.exception(
                    "the executor failed on a batch of %d tokens", sum(chunk.tokens for chunk in chunks)
                )
            # One instance for each step: an exception that is raised in several tasks mixes up tracebacks.
            return [executor_error(exc) for _ in chunks]

"""The engine of a server: sessions in, batches out. A thin asyncio driver around plain objects.

`CacheBudget` says who gets cache, `Scheduler` what runs next, `SessionTable` joins them. The engine checks
what clients claim, runs the batches on a `BlockExecutor` and keeps the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from swarmcore.errors import (
    InputError,
    InternalError,
    InvalidStepError,
    RemoteFaultError,
    ServerDrainingError,
    SessionLostError,
    SpanError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.cache import (
    CacheBudget,
)
from swarmcore.executor.gathering import Gathering
from swarmcore.executor.scheduler import Batch, Scheduler
from swarmcore.executor.session import EngineSession, SessionStep, check_codec, check_hidden
from swarmcore.executor.stats import EngineStats
from swarmcore.executor.table import SessionTable
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

MAX_TIMEOUT = 3600.0
"""Longest wait, in seconds, that a caller may ask for; more is cut to this."""

CLOSE_TIMEOUT = 10.0
"""Seconds that `Engine.close` lets the running batch finish."""


class Engine:
    """Runs the steps of many sessions on one executor, batched together.

    ``cache_tokens`` is the attention cache to share out; ``max_batch_tokens`` bounds a batch, and with it the
    time that a decode step waits for someone's prefill. A session idle for ``idle_timeout`` seconds is ended,
    or for ``idle_grace`` seconds when another one needs its room. The executor stays the caller's to close.
    """

    def __init__(
        self,
        executor: BlockExecutor,
        *,
        cache_tokens: int,
        max_batch_tokens: int = 512,
        idle_timeout: float = 600.0,
        idle_grace: float = 30.0,
        max_sessions: int = 1024,
        max_sequences: int = 1024,
        max_step_tokens: int = 16384,
        max_pending_steps: int = 64,
        max_pending_tokens: int = 262144,
    ) -> None:
        self.executor = executor
        self.max_sequences = max_sequences
        """Most sequences of one session."""
        self.max_step_tokens = max_step_tokens
        """Most tokens of one step."""
        self.max_pending_steps = max_pending_steps
        """Most steps of one session that wait or compute."""
        self.max_pending_tokens = max_pending_tokens
        """Most tokens of all steps that wait or compute."""
        self.stats = EngineStats()
        self._budget = CacheBudget(
            cache_tokens,
            executor.page,
            idle_timeout=idle_timeout,
            idle_grace=idle_grace,
            max_sessions=max_sessions,
        )
        self._scheduler: Scheduler[SessionStep] = Scheduler(max_batch_tokens)
        self._table = SessionTable(executor, self._budget, self._scheduler, self.stats)
        self._gathering = Gathering()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    # --- state -------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._table.sessions)

    @property
    def cache_tokens_free(self) -> int:
        return self._budget.free * self._budget.page

    @property
    def cache_tokens_used(self) -> int:
        return self._budget.held * self._budget.page

    @property
    def counters(self) -> dict[str, float]:
        """What has happened since the start, by name."""
        return self.stats.counters()

    def length(self, session: str) -> tuple[int, ...]:
        """Cached tokens of each sequence, of steps that are done. Raise `SessionLostError`."""
        return tuple(self._table[session].lengths)

    def __repr__(self) -> str:
        total = self._budget.pages * self._budget.page
        return (
            f"<Engine {self.executor.span} · {self.sessions} sessions · cache "
            f"{self.cache_tokens_used}/{total} · {self._table.pending_tokens} tokens pending · "
            f"{self.stats.steps} steps in {self.stats.batches} batches>"
        )

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to compute."""
        self._task = asyncio.create_task(self._compute(), name="swarmcore engine")
        self._task.add_done_callback(self._compute_ended)

    async def close(self) -> None:
        """End every session and stop; the batch that runs is waited for. Harmless when repeated."""
        self._stop(SessionLostError("the session was ended: the server is shutting down"))
        if self._task is not None:
            # A batch cannot be interrupted; leaving while it computes would free memory under it.
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT)
            self._task.cancel()
            await asyncio.wait({self._task})

    def _stop(self, error: SwarmError) -> None:
        self._closing = True
        self._table.close_all(error, _draining(), self._now())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()

    def _compute_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the engine stopped on an unexpected error", exc_info=error)
            self._stop(RemoteFaultError("the server's engine has stopped; its log has the traceback"))

    # --- what callers ask for ----------------------------------------------------------------------------

    async def open(
        self, session: str, sequences: int, tokens: int, timeout: float, span: Span | None = None
    ) -> None:
        """Admit a session of ``sequences`` sequences, with ``tokens`` of cache (over all of them) set aside.

        Its steps go through the blocks ``span``, by default all that the executor has. A token takes the same
        room in the budget whatever the span.

        Wait up to ``timeout`` seconds for that room, first come first served; raise `CacheFullError`, with
        its ``retry_after``, when it does not come free or never could. Beyond ``tokens`` the session grows as
        it goes. Raise `SpanError` for blocks that are not here, `InputError` for numbers that make no sense.
        """
        if self._closing:
            raise _draining()
        if session in self._table.sessions or session in self._table.opening:
            raise InputError(f"session {session[:8]} is open already; choose a new random name for a new one")
        if not 0 < sequences <= self.max_sequences:
            raise InputError(f"a session of {sequences} sequences; expected 1 to {self.max_sequences}")
        if tokens < 0:
            raise InputError(f"a session that needs {tokens} cache tokens; expected 0 or more")
        held = self.executor.span
        span = span or held
        if not held.start <= span.start < span.end <= held.end:
            raise SpanError(f"blocks {span} are not all here: this server holds {held}")
        now = self._now()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._table.request(session, span, sequences, tokens, answer, now + _checked(timeout), now)
        self._carry_on()
        try:
            await answer
        except BaseException:
            self._table.withdraw(session, self._now())
            self._carry_on()
            raise
        finally:
            del self._table.opening[session]

    def step(
        self,
        session: str,
        starts: Sequence[int],
        lengths: Sequence[int],
        hidden: Tensor,
        *,
        reply: Literal["all", "last"] = "all",
        codec: str = "raw",
        timeout: float,
    ) -> asyncio.Future[Tensor]:
        """Put a step in its session's line; the future is its result, ``[rows, hidden size]`` in ``codec``.

        ``starts`` and ``lengths`` have an entry for each sequence; ``hidden`` holds ``lengths[0]`` rows of
        the first, and so on. A sequence of length 0 is left alone; a start below its length rolls it back.
        ``reply`` asks for every row, or for the last row of each sequence that has any.

        Steps of a session run in the order of the calls, so the next may be put in line before the result of
        the one before it is there. Cancelling the future withdraws the step. What is wrong with a step raises
        here, at once: `SessionLostError`, `InvalidStepError`, `UnknownCodecError`, and `TooManyCallsError`
        when too much waits. The future raises `DeadlineExceededError` after ``timeout`` seconds,
        `CacheFullError` when there was no room for it in that time, `SessionLostError` when the session was
        ended, or the executor's own error. The session is then as long as it was before the step, but for
        sequences that the step had begun to roll back: those end at the step's start. Steps in line that
        build on the failed one fail like it.
        """
        found = self._table[session]
        try:
            segments = found.segments(starts, lengths)
            width = self.executor.model.hidden_size
            check_hidden(hidden, sum(lengths), width, self.max_step_tokens)
            check_codec(codec)
            if reply not in ("all", "last"):
                raise InvalidStepError(f"the step asks for {reply!r} rows; expected 'all' or 'last'")
            self._check_line(found, hidden.shape[0])
            now = self._now()
            deadline = now + _checked(timeout)
        except SwarmError:
            self.stats.refusals += 1
            raise
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        step = SessionStep(found.span, segments, hidden, reply, codec, deadline, session=found, answer=answer)
        answer.add_done_callback(partial(self._answered, step))
        if step.decode:
            self._gathering.arrived(session, now)
        self._table.submit(step, now)
        self._carry_on()
        return answer

    def close_session(self, session: str) -> None:
        """End a session and free its cache: at once, or after the batch that it computes in. Never fails."""
        self._gathering.closed(session)
        self._table.close(session, self._now())
        self._carry_on()

    def _check_line(self, session: EngineSession, rows: int) -> None:
        if len(session.line) >= self.max_pending_steps:
            raise TooManyCallsError(
                f"{len(session.line)} steps of the session wait already; await some before sending more"
            )
        waiting = self._table.pending_tokens
        if waiting + rows > self.max_pending_tokens:
            raise TooManyCallsError(
                f"{waiting} tokens wait to be computed; try again later, or another server"
            )

    def _answered(self, step: SessionStep, answer: asyncio.Future[Tensor]) -> None:
        if step.done:
            return
        # Nobody but the caller ends the future of a step that is not done: it was cancelled.
        now = self._now()
        self._table.fail(step, InvalidStepError("the step was cancelled by its caller"), now)
        self._table.poll(now)
        self._carry_on()

    # --- time --------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _carry_on(self) -> None:
        """After every change of the table: have the batches run, and the timer set."""
        if self._closing:
            return
        if len(self._scheduler):
            self._wake.set()
        when = self._table.wakeup
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
            self._timer = None
        if when < math.inf:
            self._timer = asyncio.get_running_loop().call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._table.tick(self._now())
        self._carry_on()

    # --- computing ---------------------------------------------------------------------------------------

    async def _compute(self) -> None:
        while not self._closing:
            if not len(self._scheduler):
                self._wake.clear()
                await self._wake.wait()
            else:
                # Callers just answered run first, so that their next steps join this batch.
                await asyncio.sleep(0)
            await self._gather()
            batch = self._table.schedule(self._now())
            if batch.steps:
                await self._run(batch)
            self._table.poll(self._now())
            self._carry_on()

    async def _gather(self) -> None:
        """Give decode steps that are about to come the time to join the next batch, where that pays."""
        if not (here := self._scheduler.decode_waiting):
            return
        wait = self._gathering.gather(here, self.stats.decode_seconds, self._now())
        if wait is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(wait.until):
                while 0 < self._scheduler.decode_waiting < wait.steps and not self._closing:
                    self._wake.clear()
                    await self._wake.wait()

    async def _run(self, batch: Batch[SessionStep]) -> None:
        started = self._now()
        results = await self._results(batch)
        now = self._now()
        self.stats.note_batch(batch.tokens, now - started, batch.decode_only)
        for step in self._table.landed(batch, results, now):
            try:
                encoded = await self.executor.encode(step.result(), step.codec)
            except Exception as exc:
                log.exception("the result of a step cannot be encoded as %s", step.codec)
                self._table.fail(step, _translated(exc), self._now())
            else:
                self._table.complete(step, encoded, self._now())
        for step in batch.steps:
            if step.done:
                self._gathering.answered(step.session.name, now)

    async def _results(self, batch: Batch[SessionStep]) -> Sequence[Tensor | SwarmError]:
        count = len(batch.slices)
        try:
            results = await self.executor.step(batch.slices)
            if len(results) == count:
                return results
            raise InternalError(f"the executor gave {len(results)} results for {count} slices")
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                log.exception("the executor failed on a batch of %d tokens", batch.tokens)
            # One instance for each step: an exception that is raised in several tasks mixes up tracebacks.
            return [_translated(exc) for _ in range(count)]


def _translated(exc: Exception) -> SwarmError:
    """What a step fails with when the executor raised ``exc``."""
    if isinstance(exc, SwarmError):
        return type(exc)(exc.message, **exc.details)
    error = RemoteFaultError(
        f"the server's executor failed ({type(exc).__name__}); its log has the traceback"
    )
    error.__cause__ = exc
    return error


def _checked(timeout: float) -> float:
    if timeout != timeout:
        raise InvalidStepError("the timeout is not a number; expected seconds")
    return min(timeout, MAX_TIMEOUT)


def _draining() -> ServerDrainingError:
    return ServerDrainingError("the server is shutting down; use another one")

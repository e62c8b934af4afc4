"""The engine of a server: sessions in, batches out. A thin asyncio driver around plain objects.

`CacheBudget` says who gets cache, `Scheduler` what runs next, `EngineSession` what a step may follow. The
engine checks what clients claim, carries those decisions out on a `BlockExecutor` and answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

import attrs

from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
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
from swarmcore.executor.base import BlockExecutor, SequenceId
from swarmcore.executor.cache import (
    Admission,
    Admitted,
    CacheBudget,
    Evicted,
    Grown,
    Growth,
    Outcome,
    Refused,
)
from swarmcore.executor.scheduler import Batch, Scheduler
from swarmcore.executor.session import EngineSession, SessionStep, check_codec, check_hidden, orphaned
from swarmcore.executor.stats import EngineStats
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

MAX_TIMEOUT = 3600.0
"""Longest wait, in seconds, that a caller may ask for; more is cut to this."""

CLOSE_TIMEOUT = 10.0
"""Seconds that `Engine.close` lets the running batch finish."""


@attrs.frozen
class _Opening:
    span: Span
    answer: asyncio.Future[None]


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
        self._sessions: dict[str, EngineSession] = {}
        self._opening: dict[str, _Opening] = {}
        self._next_sequence = 0
        self._pending_tokens = 0
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    # --- state -------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

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
        return tuple(self._session(session).lengths)

    def __repr__(self) -> str:
        total = self._budget.pages * self._budget.page
        return (
            f"<Engine {self.executor.span} · {len(self._sessions)} sessions · cache "
            f"{self.cache_tokens_used}/{total} · {self._pending_tokens} tokens pending · "
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
        for opening in self._opening.values():
            if not opening.answer.done():
                opening.answer.set_exception(
                    ServerDrainingError("the server is shutting down; use another one")
                )
        for session in list(self._sessions.values()):
            self._end(session, error)
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
            raise ServerDrainingError("the server is shutting down; use another one")
        if session in self._sessions or session in self._opening:
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
        try:
            request = self._budget.request(session, sequences, tokens, now + _checked(timeout), now)
        except CacheFullError:
            self.stats.refusals += 1
            raise
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening[session] = _Opening(span, answer)
        try:
            self._poll(now)
            if not answer.done():
                self._arm(request.deadline)
            await answer
        except BaseException:
            self._abandon(request)
            raise
        finally:
            del self._opening[session]

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
        found = self._session(session)
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
        found.append(step)
        found.holding.idle_since = None
        self._pending_tokens += step.rows
        self._arm(deadline)
        self._settle(found, now)
        self._poll(now)
        return answer

    def close_session(self, session: str) -> None:
        """End a session and free its cache: at once, or after the batch that it computes in. Never fails."""
        found = self._sessions.get(session)
        if found is not None:
            self._end(found, SessionLostError(f"session {session[:8]} was closed"))
            self._poll(self._now())

    def _check_line(self, session: EngineSession, rows: int) -> None:
        if len(session.line) >= self.max_pending_steps:
            raise TooManyCallsError(
                f"{len(session.line)} steps of the session wait already; await some before sending more"
            )
        if self._pending_tokens + rows > self.max_pending_tokens:
            raise TooManyCallsError(
                f"{self._pending_tokens} tokens wait to be computed; try again later, or another server"
            )

    def _session(self, name: str) -> EngineSession:
        try:
            return self._sessions[name]
        except KeyError:
            raise SessionLostError(
                f"no session {name[:8]} here: it expired, was closed or made room; open a new one and replay"
            ) from None

    # --- the line of a session ---------------------------------------------------------------------------

    def _advance(self, session: EngineSession, now: float) -> None:
        """Give the first step in line to the scheduler once nothing before it is under way."""
        while session.line and session.active is None:
            step = session.active = session.line[0]
            try:
                grown = self._budget.grow(session.holding, session.target(step), step.deadline, now)
            except CacheFullError as exc:
                self.stats.refusals += 1
                self._discard(step, exc)
                continue
            if grown:
                self._runnable(session, step)
            elif (when := self._budget.next_wakeup(now)) is not None:
                self._arm(when)

    def _runnable(self, session: EngineSession, step: SessionStep) -> None:
        self._reserve(session)
        self._scheduler.add(step)
        self._wake.set()

    def _complete(self, step: SessionStep, result: Tensor, now: float) -> None:
        step.done = True
        self._pending_tokens -= step.rows
        step.session.complete(step)
        self.stats.steps += 1
        if not step.answer.done():
            step.answer.set_result(result)
        self._settle(step.session, now)

    def _fail(self, step: SessionStep, error: SwarmError, now: float) -> None:
        self._discard(step, error)
        self._settle(step.session, now)

    def _discard(self, step: SessionStep, error: SwarmError) -> None:
        if step.done:
            return
        step.done = True
        self._pending_tokens -= step.rows
        self.stats.steps_failed += 1
        self._scheduler.remove(step)
        session = step.session
        if session.active is step:
            self._budget.stop_waiting(session.holding)
        orphans = session.discard(step)
        if not step.answer.done():
            step.answer.set_exception(error)
        for orphan in orphans:
            self._discard(orphan, orphaned(error))

    def _answered(self, step: SessionStep, answer: asyncio.Future[Tensor]) -> None:
        if step.done:
            return
        # Nobody but the caller ends the future of a step that is not done: it was cancelled.
        now = self._now()
        self._fail(step, InvalidStepError("the step was cancelled by its caller"), now)
        self._poll(now)

    def _settle(self, session: EngineSession, now: float) -> None:
        """Go on with the line of a session, and return what cache it no longer uses."""
        if session.computing:
            return
        if session.active is None:
            self._budget.settle(session.holding, session.lengths, now)
            self._reserve(session)
        self._advance(session, now)
        if not session.line and session.holding.idle_since is None:
            session.holding.idle_since = now
            self._arm(now + (self._budget.idle_grace if self._budget.growths else self._budget.idle_timeout))

    def _reserve(self, session: EngineSession) -> None:
        pages = session.holding.pages
        if session.reserved != pages:
            for sequence, old, new in zip(session.sequences, session.reserved, pages, strict=True):
                if old != new:
                    self.executor.reserve(sequence, new * self._budget.page)
            session.reserved = pages

    # --- sessions come and go ----------------------------------------------------------------------------

    def _poll(self, now: float) -> None:
        while outcomes := self._budget.poll(now):
            self._carry_out(outcomes, now)

    def _carry_out(self, outcomes: Iterable[Outcome], now: float) -> None:
        for outcome in outcomes:
            match outcome:
                case Admitted():
                    self._admit(outcome)
                case Grown(holding):
                    session = self._sessions[holding.session]
                    assert session.active is not None
                    self._runnable(session, session.active)
                case Refused(Admission(session=name), error):
                    self.stats.refusals += 1
                    answer = self._opening[name].answer
                    if not answer.done():
                        answer.set_exception(error)
                case Refused(Growth(holding=holding), error):
                    self.stats.refusals += 1
                    step = self._sessions[holding.session].active
                    assert step is not None
                    self._fail(step, error, now)
                case Evicted(holding, lost):
                    self.stats.sessions_evicted += 1
                    log.info("%s", lost)
                    self._end(self._sessions[holding.session], lost)

    def _admit(self, outcome: Admitted) -> None:
        name, count = outcome.request.session, outcome.request.sequences
        sequences = tuple(SequenceId(self._next_sequence + n) for n in range(count))
        self._next_sequence += count
        opening = self._opening[name]
        self._sessions[name] = EngineSession(name, opening.span, sequences, outcome.holding)
        self.stats.sessions_opened += 1
        self._arm(self._now() + self._budget.idle_timeout)
        if not opening.answer.done():
            opening.answer.set_result(None)

    def _abandon(self, request: Admission) -> None:
        self._budget.withdraw(request)
        # It may have been admitted while its caller was being cancelled.
        self.close_session(request.session)
        self._poll(self._now())

    def _end(self, session: EngineSession, error: SwarmError) -> None:
        del self._sessions[session.name]
        session.closed = True
        while session.line:
            self._discard(session.line[0], error)
        if not session.computing:
            self._free(session)

    def _free(self, session: EngineSession) -> None:
        self._budget.release(session.holding, self._now())
        for sequence in session.sequences:
            self.executor.release(sequence)

    # --- time --------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _arm(self, when: float) -> None:
        """See to it that `_tick` runs at ``when``, or before: a tick too early does no harm."""
        if self._closing:
            return
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._now()
        self._carry_out(self._budget.expire(now), now)
        for session in list(self._sessions.values()):
            for step in [step for step in session.line if step.deadline <= now]:
                self._fail(step, _expired(step), now)
        self._poll(now)
        deadlines = [step.deadline for session in self._sessions.values() for step in session.line]
        wakeup = self._budget.next_wakeup(now)
        if wakeup is not None or deadlines:
            self._arm(min([*deadlines, *([] if wakeup is None else [wakeup])]))

    # --- computing ---------------------------------------------------------------------------------------

    async def _compute(self) -> None:
        while not self._closing:
            if not len(self._scheduler):
                self._wake.clear()
                await self._wake.wait()
            else:
                # Callers just answered run first, so that their next steps join this batch.
                await asyncio.sleep(0)
            batch = self._scheduler.schedule(self._now())
            for step in batch.expired:
                self._fail(step, _expired(step), self._now())
            if batch.steps:
                await self._run(batch)
            self._poll(self._now())

    async def _run(self, batch: Batch[SessionStep]) -> None:
        for step in batch.steps:
            step.session.computing = True
        started = self._now()
        results = await self._results(batch)
        now = self._now()
        self.stats.note_batch(batch.tokens, now - started, batch.decode_only)
        joined = []
        for step, result in zip(batch.steps, results, strict=True):
            session = step.session
            session.computing = False
            if session.closed:
                self._free(session)
            elif step.done:
                self._settle(session, now)
            elif isinstance(result, SwarmError):
                self._fail(step, result, now)
            elif self._put(step, result, now):
                if step.whole or step.codec == "raw":
                    self._complete(step, step.result(), now)
                else:
                    joined.append(step)
        for step in joined:
            await self._encode(step)

    async def _results(self, batch: Batch[SessionStep]) -> Sequence[Tensor | SwarmError]:
        count = len(batch.slices)
        try:
            results = await self.executor.step(batch.slices)
            if len(results) == count:
                return results
            raise InternalError(f"the executor gave {len(results)} results for {count} slices")
        except SwarmError as exc:
            # One instance for each step: an exception that is raised in several tasks mixes up tracebacks.
            return [type(exc)(exc.message, **exc.details) for _ in range(count)]
        except Exception as exc:
            log.exception("the executor failed on a batch of %d tokens", batch.tokens)
            message = f"the server's executor failed ({type(exc).__name__}); its log has the traceback"
            return [RemoteFaultError(message) for _ in range(count)]

    def _put(self, step: SessionStep, result: Tensor, now: float) -> bool:
        try:
            step.put(result)
        except InternalError as exc:
            log.error("%s", exc)
            self._fail(step, exc, now)
            return False
        return step.finished

    async def _encode(self, step: SessionStep) -> None:
        try:
            result = await self.executor.encode(step.result(), step.codec)
        except SwarmError as exc:
            self._fail(step, exc, self._now())
            return
        if not step.done:
            self._complete(step, result, self._now())


def _checked(timeout: float) -> float:
    if timeout != timeout:
        raise InvalidStepError("the timeout is not a number; expected seconds")
    return min(timeout, MAX_TIMEOUT)


def _expired(step: SessionStep) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the step of {step.rows} tokens was not computed by its deadline ({step.taken} tokens were)"
    )

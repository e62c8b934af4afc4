"""All sessions of an engine: how they begin and end, the steps in their lines, the cache they hold.

A plain object, told ``now`` with every call. Afterwards its scheduler holds what can be computed, and
`wakeup` says when to call `tick`. Answers go into the futures that came with the requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence

import attrs

from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    InternalError,
    SessionLostError,
    SwarmError,
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
from swarmcore.executor.session import EngineSession, SessionStep, orphaned
from swarmcore.executor.stats import EngineStats
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)


@attrs.frozen
class _Opening:
    span: Span
    request: Admission
    answer: asyncio.Future[None]


class SessionTable:
    """Joins the budget, the scheduler and the sessions; reserves and releases the executor's caches."""

    def __init__(
        self,
        executor: BlockExecutor,
        budget: CacheBudget,
        scheduler: Scheduler[SessionStep],
        stats: EngineStats,
    ) -> None:
        self.sessions: dict[str, EngineSession] = {}
        self.opening: dict[str, _Opening] = {}
        self.pending_tokens = 0
        """Tokens of the steps in all lines."""
        self.wakeup = math.inf
        """When `tick` is due, at the latest; earlier does no harm."""
        self._executor = executor
        self._budget = budget
        self._scheduler = scheduler
        self._stats = stats
        self._next_sequence = 0

    def __getitem__(self, name: str) -> EngineSession:
        try:
            return self.sessions[name]
        except KeyError:
            raise SessionLostError(
                f"no session {name[:8]} here: it expired, was closed or made room; open a new one and replay"
            ) from None

    # --- sessions begin and end --------------------------------------------------------------------------

    def request(
        self,
        name: str,
        span: Span,
        sequences: int,
        tokens: int,
        answer: asyncio.Future[None],
        deadline: float,
        now: float,
    ) -> None:
        """Put a new session in line; `withdraw` has to follow when ``answer`` is not a success.

        Raise `CacheFullError` when it could never be admitted, or too many wait.
        """
        try:
            request = self._budget.request(name, sequences, tokens, deadline, now)
        except CacheFullError:
            self._stats.refusals += 1
            raise
        self.opening[name] = _Opening(span, request, answer)
        self._wake_by(deadline)
        self.poll(now)

    def withdraw(self, name: str, now: float) -> None:
        """Forget a new session, also when it has just been admitted."""
        self._budget.withdraw(self.opening[name].request)
        self.close(name, now)
        self.poll(now)

    def close(self, name: str, now: float) -> None:
        """End a session; unknown ones are ignored."""
        if (session := self.sessions.get(name)) is not None:
            self._end(session, SessionLostError(f"session {name[:8]} was closed"), now)
            self.poll(now)

    def close_all(self, error: SwarmError, refusal: SwarmError, now: float) -> None:
        """End every session with ``error``; those that wait to be opened get ``refusal``."""
        for opening in self.opening.values():
            self._budget.withdraw(opening.request)
            if not opening.answer.done():
                opening.answer.set_exception(refusal)
        for session in list(self.sessions.values()):
            self._end(session, error, now)

    def _admit(self, request: Admission, outcome: Admitted, now: float) -> None:
        opening = self.opening[request.session]
        ids = range(self._next_sequence, self._next_sequence + request.sequences)
        self._next_sequence = ids.stop
        sequences = tuple(map(SequenceId, ids))
        self.sessions[request.session] = EngineSession(
            request.session, opening.span, sequences, outcome.holding
        )
        self._stats.sessions_opened += 1
        self._wake_by(now + self._budget.idle_timeout)
        # When its caller is just being cancelled, `withdraw` follows.
        if not opening.answer.done():
            opening.answer.set_result(None)

    def _end(self, session: EngineSession, error: SwarmError, now: float) -> None:
        del self.sessions[session.name]
        session.closed = True
        while session.line:
            self._discard(session.line[0], error)
        if not session.computing:
            self._free(session, now)

    def _free(self, session: EngineSession, now: float) -> None:
        self._budget.release(session.holding, now)
        for sequence in session.sequences:
            self._executor.release(sequence)

    # --- steps in line -----------------------------------------------------------------------------------

    def submit(self, step: SessionStep, now: float) -> None:
        """Put a step, which has been checked, at the end of its session's line."""
        session = step.session
        session.append(step)
        session.holding.idle_since = None
        self.pending_tokens += step.rows
        self._wake_by(step.deadline)
        self._settle(session, now)
        self.poll(now)

    def complete(self, step: SessionStep, result: Tensor, now: float) -> None:
        """The first step in line is done; harmless when it has failed meanwhile."""
        if step.done:
            return
        step.done = True
        self.pending_tokens -= step.rows
        step.session.complete(step)
        self._stats.steps += 1
        if not step.answer.done():
            step.answer.set_result(result)
        self._settle(step.session, now)

    def fail(self, step: SessionStep, error: SwarmError, now: float) -> None:
        """Take a step out of its line, and those that build on it; harmless when it is done."""
        self._discard(step, error)
        self._settle(step.session, now)

    def _discard(self, step: SessionStep, error: SwarmError) -> None:
        if step.done:
            return
        step.done = True
        self.pending_tokens -= step.rows
        self._stats.steps_failed += 1
        self._scheduler.remove(step)
        session = step.session
        if session.active is step:
            self._budget.stop_waiting(session.holding)
        orphans = session.discard(step)
        if not step.answer.done():
            step.answer.set_exception(error)
        for orphan in orphans:
            self._discard(orphan, orphaned(error))

    def _settle(self, session: EngineSession, now: float) -> None:
        """Go on with the line of a session, and return what cache it no longer uses."""
        if session.computing or session.closed:
            return
        if session.active is None:
            self._budget.settle(session.holding, session.lengths, now)
            self._reserve(session)
        while session.line and session.active is None:
            self._activate(session, session.line[0], now)
        if not session.line and session.holding.idle_since is None:
            session.holding.idle_since = now
            self._wake_by(
                now + (self._budget.idle_grace if self._budget.growths else self._budget.idle_timeout)
            )

    def _activate(self, session: EngineSession, step: SessionStep, now: float) -> None:
        session.active = step
        try:
            grown = self._budget.grow(session.holding, session.target(step), step.deadline, now)
        except CacheFullError as exc:
            self._stats.refusals += 1
            self._discard(step, exc)
            return
        if grown:
            self._reserve(session)
            self._scheduler.add(step)
        else:
            self._wake_by(self._budget.next_wakeup(now))

    def _reserve(self, session: EngineSession) -> None:
        pages = session.holding.pages
        if session.reserved != pages:
            for sequence, old, new in zip(session.sequences, session.reserved, pages, strict=True):
                if old != new:
                    self._executor.reserve(sequence, new * self._budget.page)
            session.reserved = pages

    # --- batches -----------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch[SessionStep]:
        """The next batch; until `landed`, its sessions keep their cache whatever happens to them."""
        batch = self._scheduler.schedule(now)
        for step in batch.expired:
            self.fail(step, _expired(step), now)
        for step in batch.steps:
            step.session.computing = True
        return batch

    def landed(
        self, batch: Batch[SessionStep], results: Sequence[Tensor | SwarmError], now: float
    ) -> list[SessionStep]:
        """Take in a batch's results; return the steps that are computed and still have to be encoded."""
        joined = []
        for step, result in zip(batch.steps, results, strict=True):
            session = step.session
            session.computing = False
            if session.closed:
                self._free(session, now)
            elif step.done:
                self._settle(session, now)
            elif isinstance(result, SwarmError):
                self.fail(step, result, now)
            elif self._put(step, result, now):
                if step.whole or step.codec == "raw":
                    self.complete(step, step.result(), now)
                else:
                    joined.append(step)
        return joined

    def _put(self, step: SessionStep, result: Tensor, now: float) -> bool:
        try:
            step.put(result)
        except InternalError as exc:
            log.error("%s", exc)
            self.fail(step, exc, now)
            return False
        return step.finished

    # --- what the budget decides, and time ---------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Carry out what has become possible in the cache."""
        while outcomes := self._budget.poll(now):
            self._carry_out(outcomes, now)

    def tick(self, now: float) -> None:
        """End what is overdue."""
        self._carry_out(self._budget.expire(now), now)
        for session in list(self.sessions.values()):
            for step in [step for step in session.line if step.deadline <= now]:
                self.fail(step, _expired(step), now)
        self.poll(now)
        deadlines = (step.deadline for session in self.sessions.values() for step in session.line)
        self.wakeup = min(deadlines, default=math.inf)
        self._wake_by(self._budget.next_wakeup(now))

    def _wake_by(self, when: float | None) -> None:
        if when is not None and when < self.wakeup:
            self.wakeup = when

    def _carry_out(self, outcomes: Iterable[Outcome], now: float) -> None:
        for outcome in outcomes:
            match outcome:
                case Admitted(request):
                    self._admit(request, outcome, now)
                case Grown(holding):
                    session = self.sessions[holding.session]
                    assert session.active is not None
                    self._reserve(session)
                    self._scheduler.add(session.active)
                case Refused(Admission(session=name), error):
                    self._stats.refusals += 1
                    answer = self.opening[name].answer
                    if not answer.done():
                        answer.set_exception(error)
                case Refused(Growth(holding=holding), error):
                    self._stats.refusals += 1
                    step = self.sessions[holding.session].active
                    assert step is not None
                    self.fail(step, error, now)
                case Evicted(holding, lost):
                    self._stats.sessions_evicted += 1
                    log.info("%s", lost)
                    self._end(self.sessions[holding.session], lost, now)


def _expired(step: SessionStep) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the step of {step.rows} tokens was not computed by its deadline ({step.taken} tokens were)"
    )

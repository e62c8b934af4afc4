"""All sessions of an engine: how they begin and end, the steps in their lines, the cache they hold.

A plain object, told ``now`` with every call. Afterwards its scheduler holds what can be computed, and
`wakeup` says when to call `tick`. Answers go into the futures that came with the requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from swarmcore.engine.cache_requests import Admission, Admitted, Evicted, Grown, Growth, Outcome, Refused
from swarmcore.engine.kv_cache_manager import KVCacheManager
from swarmcore.engine.scheduler import Batch, Scheduler
from swarmcore.engine.session import (
    EngineSession,
    KVImport,
    Opening,
    SessionStep,
    Share,
    Turn,
    confused,
    expired,
    orphaned,
)
from swarmcore.engine.stats import EngineStats
from swarmcore.errors import (
    CacheFullError,
    InternalError,
    InvalidStepError,
    SessionLostError,
    SwarmError,
)
from swarmcore.executor.base import Adapter, BlockExecutor, SequenceId
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

EXTENDED_EVERY = 1.0
"""Seconds for which deadlines may be behind: to move all of them takes time."""


class SessionTable:
    """Joins the budget, the scheduler and the sessions; reserves and releases the executor's caches."""

    def __init__(
        self,
        executor: BlockExecutor,
        budget: KVCacheManager,
        scheduler: Scheduler[SessionStep],
        stats: EngineStats,
    ) -> None:
        self.sessions: dict[str, EngineSession] = {}
        self.opening: dict[str, Opening] = {}
        self.blocks = len(executor.span)
        """Blocks that a token of the budget reaches through, however many the executor comes to hold."""
        self.pending_tokens = 0
        """Tokens of the steps in all lines."""
        self.wakeup = math.inf
        """When `tick` is due, at the latest; earlier does no harm."""
        self._executor = executor
        self._budget = budget
        self._scheduler = scheduler
        self._stats = stats
        self._next_sequence = 0
        self.pending_by_caller: Counter[str] = Counter()
        """The same, of each caller."""
        self._extended_at = -math.inf

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
        adapter: Adapter | None = None,
        caller: str = "",
    ) -> None:
        """Put a new session of ``caller`` in line; `withdraw` has to follow when ``answer`` is not a success.

        Raise `CacheFullError` when it could never be admitted, or too many wait.
        """
        share = Share(len(span), self.blocks)
        page = self._budget.page
        tokens += sequences * adapter.prefix_tokens if adapter is not None and tokens else 0
        tokens = sequences * page * share.charge(-(-tokens // (sequences * page)))
        try:
            request = self._budget.request(name, sequences, tokens, deadline, now, caller)
        except CacheFullError:
            self._stats.refusals += 1
            raise
        self.opening[name] = Opening(span, share, adapter, request, answer)
        self._wake_by(deadline)
        self.poll(now)
        self._wake_by(self._budget.next_wakeup(now))

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
        session = EngineSession(request.session, opening, sequences, outcome.holding)
        self.sessions[request.session] = session
        self._stats.sessions_opened += 1
        self._wake_by(now + self._budget.idle_grace)  # if it does not use what was set aside for it
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

    # --- turns in line -----------------------------------------------------------------------------------

    def submit(self, turn: Turn, now: float) -> None:
        """Put what has been checked at the end of its session's line."""
        session = turn.session
        session.append(turn)
        session.holding.idle_since = None
        self.pending_tokens += turn.rows
        self.pending_by_caller[session.holding.caller] += turn.rows
        self._wake_by(turn.deadline)
        self._settle(session, now)
        self.poll(now)

    def complete(self, step: SessionStep, result: Tensor, now: float) -> None:
        """The first step in line is done; harmless when it has failed meanwhile."""
        if step.done:
            return
        self._finish(step)
        self._stats.steps += 1
        if not step.answer.done():
            step.answer.set_result(result)
        self._settle(step.session, now)

    def _finish(self, turn: Turn) -> None:
        turn.done = True
        self._no_longer_pending(turn)
        turn.session.complete(turn)

    def _no_longer_pending(self, turn: Turn) -> None:
        caller = turn.session.holding.caller
        self.pending_tokens -= turn.rows
        self.pending_by_caller[caller] -= turn.rows
        if not self.pending_by_caller[caller]:
            del self.pending_by_caller[caller]

    def fail(self, turn: Turn, error: SwarmError, now: float) -> None:
        """Take a turn out of its line, and those that build on it; harmless when it is done.

        The session ends when its caches have been reordered for this step: they are not what its client
        takes them for.
        """
        if turn.reordered and not turn.done:
            self._end(turn.session, confused(turn.session, error), now)
            return
        self._discard(turn, error)
        self._settle(turn.session, now)

    def _discard(self, turn: Turn, error: SwarmError) -> None:
        if turn.done:
            return
        turn.done = True
        self._no_longer_pending(turn)
        self._stats.steps_failed += 1
        session = turn.session
        if session.active is turn:
            self._budget.stop_waiting(session.holding)
        orphans = session.discard(turn)
        if isinstance(turn, SessionStep):
            self._scheduler.remove(turn)
        if not turn.answer.done():
            turn.answer.set_exception(error)
        for orphan in orphans:
            self._discard(orphan, orphaned(error))

    def _settle(self, session: EngineSession, now: float) -> None:
        """Go on with the line of a session, and return what cache it no longer uses."""
        if session.computing or session.closed:
            return
        if session.active is None:
            self._budget.settle(session.holding, self._charged(session, session.lengths), now)
            self._reserve(session)
        while session.line and session.active is None:
            self._activate(session, session.line[0], now)
        if not session.line and session.holding.idle_since is None:
            session.holding.idle_since = now
            self._wake_by(
                now + (self._budget.idle_grace if self._budget.growths else self._budget.idle_timeout)
            )

    def _activate(self, session: EngineSession, turn: Turn, now: float) -> None:
        session.active = turn
        target = self._charged(session, session.target(turn))
        try:
            grown = self._budget.grow(session.holding, target, turn.deadline, now)
        except CacheFullError as exc:
            self._stats.refusals += 1
            self._discard(turn, exc)
            return
        if grown:
            self._go(session, turn)
        else:
            self._wake_by(self._budget.next_wakeup(now))

    def _go(self, session: EngineSession, turn: Turn) -> None:
        """The first turn in line has its room."""
        self._reserve(session)
        if isinstance(turn, SessionStep):
            self._scheduler.add(turn)
        else:
            session.computing = turn.begun = True
            turn.begin(turn)

    def _charged(self, session: EngineSession, lengths: Sequence[int]) -> list[int]:
        """What sequences of so many tokens take of the budget, in its tokens."""
        page, prefix = self._budget.page, session.prefix_tokens
        needs = (length + prefix if length else 0 for length in lengths)
        return [session.share.charge(-(-need // page)) * page for need in needs]

    def _reserve(self, session: EngineSession) -> None:
        pages = session.holding.pages
        if session.reserved != pages:
            for sequence, old, new in zip(session.sequences, session.reserved, pages, strict=True):
                if old != new:
                    self._executor.reserve(sequence, session.share.pages(new) * self._budget.page)
            session.reserved = pages

    # --- batches -----------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch[SessionStep]:
        """The next batch; until `landed`, its sessions keep their cache whatever happens to them."""
        batch = self._scheduler.schedule(now)
        for step in batch.expired:
            self.fail(step, expired(step), now)
        for step, part in zip(batch.steps, batch.slices, strict=True):
            step.session.computing = True
            if part.first_row == 0:
                if step.sources:
                    step.session.reorder(step)
                if step.decode:
                    self._stats.note_wait(now - step.submitted, now)
        return batch

    def landed(
        self, batch: Batch[SessionStep], results: Sequence[Tensor | SwarmError], now: float
    ) -> list[SessionStep]:
        """Take in a batch's results; return the steps that are computed and still have to be encoded."""
        joined = []
        self.worked(now)
        for step, part, result in zip(batch.steps, batch.slices, results, strict=True):
            session = step.session
            session.computing = False
            if not isinstance(result, SwarmError):
                session.computed += part.tokens
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

    def worked(self, now: float) -> None:
        """The executor got something done: the time of steps that wait for it begins anew.

        So a server that is slow computes what it has taken in; one that hangs says so in time. For those that
        wait for room in the cache nothing changes.
        """
        if now < self._extended_at + EXTENDED_EVERY:
            return
        self._extended_at = now
        for session in self.sessions.values():
            if session.holding.growth is None:
                for turn in session.line:
                    turn.deadline = max(turn.deadline, now + turn.timeout)

    def _put(self, step: SessionStep, result: Tensor, now: float) -> bool:
        try:
            step.put(result)
        except InternalError as exc:
            log.error("%s", exc)
            self.fail(step, exc, now)
            return False
        return step.finished

    # --- caches that come and go -------------------------------------------------------------------------

    def imported(self, turn: KVImport, error: SwarmError | None, now: float) -> None:
        """The executor has taken in a piece of cache, or failed to."""
        self.let_go(turn.session, now)
        self.worked(now)
        if error is not None:
            self.fail(turn, error, now)
        elif not turn.done:
            turn.session.computed += turn.rows
            self._finish(turn)
            if not turn.answer.done():
                turn.answer.set_result(None)
            self._settle(turn.session, now)

    def hold(self, session: EngineSession) -> None:
        """Keep the session's caches as they are until `let_go`; its steps wait meanwhile.

        Raise `InvalidStepError` while it has steps in line.
        """
        if session.line or session.computing:
            raise InvalidStepError(
                f"session {session.name[:8]} has steps in line; its caches cannot be exported before these "
                f"are done"
            )
        session.computing = True
        session.holding.idle_since = None

    def let_go(self, session: EngineSession, now: float) -> None:
        """The executor no longer works on the session's caches."""
        session.computing = False
        if session.closed:
            self._free(session, now)
        else:
            self._settle(session, now)

    # --- what the budget decides, and time ---------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Carry out what has become possible in the cache."""
        while outcomes := self._budget.poll(now):
            self._carry_out(outcomes, now)

    def tick(self, now: float) -> None:
        """End what is overdue."""
        self._carry_out(self._budget.expire(now), now)
        for session in list(self.sessions.values()):
            for turn in [turn for turn in session.line if turn.deadline <= now]:
                self.fail(turn, expired(turn), now)
        self.poll(now)
        deadlines = (turn.deadline for session in self.sessions.values() for turn in session.line)
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
                    self._go(session, session.active)
                case Refused(Admission(session=name), error):
                    self._stats.refusals += 1
                    answer = self.opening[name].answer
                    if not answer.done():
                        answer.set_exception(error)
                case Refused(Growth(holding=holding), error):
                    self._stats.refusals += 1
                    turn = self.sessions[holding.session].active
                    assert turn is not None
                    self.fail(turn, error, now)
                case Evicted(holding, lost):
                    self._stats.sessions_evicted += 1
                    log.info("%s", lost)
                    self._end(self.sessions[holding.session], lost, now)

"""All sessions of an engine: how they begin and end, the steps in their queues, the cache they hold.

A plain object without a clock: every call gets ``now``. After each, its scheduler holds what can be computed,
and `wakeup` is when to call `tick`. Results and errors go into the futures that came with the requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence

from swarmcore.engine.kv_allocation import (
    AdmissionRequest,
    Admitted,
    Evicted,
    Grown,
    GrowthRequest,
    KVAllocation,
    Outcome,
    Refused,
)
from swarmcore.engine.kv_cache_manager import KVCacheManager
from swarmcore.engine.scheduler import ScheduledBatch, Scheduler
from swarmcore.engine.session import (
    EngineSession,
    KVImport,
    PendingSession,
    PendingTokens,
    QueueItem,
    SessionStep,
    deadline_error,
    orphan_error,
    reject,
    reordered_error,
    resolve,
)
from swarmcore.engine.session_prefixes import SessionPrefixes
from swarmcore.engine.stats import EngineStats
from swarmcore.errors import CacheFullError, InternalError, InvalidStepError, SessionLostError, SwarmError
from swarmcore.executor.base import Adapter, BlockExecutor, SequenceId
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

EXTENDED_EVERY = 1.0
"""Seconds for which deadlines may be behind: to move all of them takes time."""


class SessionManager:
    """Joins KV cache manager, prefix cache, scheduler and sessions; reserves and releases executor's caches.

    A step is put in its session's queue (`submit`). First there, it asks for its pages (`_activate`); once
    they are granted it is the scheduler's (`_start`), and runs in chunks (`schedule`, `finish_batch`) until
    it is done (`complete`) or fails (`fail`), with those in the queue that build on it. What a batch computes
    with stays as it is until the batch is through, even that of a session that has ended.
    """

    def __init__(
        self,
        executor: BlockExecutor,
        kv_cache: KVCacheManager,
        scheduler: Scheduler[SessionStep],
        pending: PendingTokens,
        prefixes: SessionPrefixes,
        stats: EngineStats,
    ) -> None:
        self.sessions: dict[str, EngineSession] = {}
        self.opening: dict[str, PendingSession] = {}
        self.pending = pending
        self.wakeup = math.inf
        """When `tick` is due, at the latest; earlier does no harm."""
        self._executor = executor
        self._kv_cache = kv_cache
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._stats = stats
        self._next_sequence = 0
        self._extended_at = -math.inf

    def __getitem__(self, name: str) -> EngineSession:
        try:
            return self.sessions[name]
        except KeyError:
            raise SessionLostError(
                f"no session {name[:8]} here: it expired, was closed or made room; open a new one and replay"
            ) from None

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
        """Queue a new session of ``caller``; `withdraw` has to follow when ``answer`` is not a success.

        Raise `CacheFullError` when it could never be admitted, or too many wait.
        """
        prefix = adapter.prefix_tokens if adapter is not None else 0
        blocks = len(self._executor.span if self._executor.caches_whole_span else span)
        try:
            request = self._kv_cache.request(
                name, sequences, tokens, deadline, now, caller, blocks=blocks, prefix_tokens=prefix
            )
        except CacheFullError:
            self._stats.refusals += 1
            raise
        self.opening[name] = PendingSession(span, adapter, request, answer)
        self._wake_by(deadline)
        self.poll(now)
        self._wake_by(self._kv_cache.next_wakeup(now))

    def withdraw(self, name: str, now: float) -> None:
        """Forget a new session, also when it has just been admitted."""
        self._kv_cache.withdraw(self.opening[name].request)
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
            self._kv_cache.withdraw(opening.request)
            reject(opening.answer, refusal)
        for session in list(self.sessions.values()):
            self._end(session, error, now)

    def _admit(self, request: AdmissionRequest, allocation: KVAllocation, now: float) -> None:
        opening = self.opening[request.session]
        first = self._next_sequence
        self._next_sequence += request.sequences
        sequences = tuple(map(SequenceId, range(first, self._next_sequence)))
        session = EngineSession(request.session, opening, sequences, allocation)
        self.sessions[request.session] = session
        self._stats.sessions_opened += 1
        self._wake_by(now + self._kv_cache.idle_grace)  # if it does not use what was set aside for it
        # When its caller is just being cancelled, `withdraw` follows.
        resolve(opening.answer, None)

    def _end(self, session: EngineSession, error: SwarmError, now: float) -> None:
        del self.sessions[session.name]
        session.closed = True
        while session.queue:
            self._drop(session.queue[0], error)
        if not session.computing:
            self._free(session, now)

    def _free(self, session: EngineSession, now: float) -> None:
        self._kv_cache.release(session.allocation, now)
        self._prefixes.release(session)
        self._prefixes.shrink(self._kv_cache.free)

    # --- steps in the queue ------------------------------------------------------------------------------

    def submit(self, item: QueueItem, now: float) -> None:
        """Put what has been checked at the end of its session's queue."""
        session = item.session
        session.append(item)
        session.allocation.idle_since = None
        self.pending.add(item.caller, item.rows)
        self._wake_by(item.deadline)
        self._advance(session, now)
        self.poll(now)

    def complete(self, step: SessionStep, result: Tensor, now: float) -> None:
        """The first step in the queue is done; harmless when it has failed meanwhile."""
        if step.done:
            return
        self._finish(step)
        self._stats.steps += 1
        if not step.answer.done():  # else whoever waits was cancelled
            step.answer.set_result(result)
        self._advance(step.session, now)

    def _finish(self, item: QueueItem) -> None:
        item.done = True
        self.pending.remove(item.caller, item.rows)
        item.session.complete(item)
        self._prefixes.finished(item)

    def fail(self, item: QueueItem, error: SwarmError, now: float) -> None:
        """Take an item out of its queue, and those that build on it; harmless when it is done.

        The session ends when its caches have been reordered for this step: they are not what its client
        takes them for.
        """
        if item.reordered and not item.done:
            self._end(item.session, reordered_error(item.session, error), now)
            return
        self._drop(item, error)
        self._advance(item.session, now)

    def _drop(self, item: QueueItem, error: SwarmError) -> None:
        if item.done:
            return
        item.done = True
        self.pending.remove(item.caller, item.rows)
        self._stats.steps_failed += 1
        session = item.session
        if session.active is item:
            self._kv_cache.stop_waiting(session.allocation)
        orphans = session.discard(item)
        if isinstance(item, SessionStep):
            self._scheduler.remove(item)
        reject(item.answer, error)
        for orphan in orphans:
            self._drop(orphan, orphan_error(error))

    def _advance(self, session: EngineSession, now: float) -> None:
        """Go on with the queue of a session, and return what cache it no longer uses."""
        if session.computing or session.closed:
            return
        if session.active is None:
            self._kv_cache.settle(session.allocation, session.lengths, now)
            self._reserve(session)
        while session.queue and session.active is None:
            self._activate(session, session.queue[0], now)
        if not session.queue and session.allocation.idle_since is None:
            session.allocation.idle_since = now
            cache = self._kv_cache
            self._wake_by(now + (cache.idle_grace if cache.growths else cache.idle_timeout))

    def _activate(self, session: EngineSession, item: QueueItem, now: float) -> None:
        session.active = item
        try:
            grown = self._kv_cache.grow(session.allocation, session.target(item), item.deadline, now)
        except CacheFullError as exc:
            self._stats.refusals += 1
            self._drop(item, exc)
            return
        if grown:
            self._start(session, item)
        else:
            self._wake_by(self._kv_cache.next_wakeup(now))

    def _start(self, session: EngineSession, item: QueueItem) -> None:
        """The first item in the queue has its room."""
        self._reserve(session)
        if isinstance(item, SessionStep):
            self._scheduler.add(item)
        else:
            self._prefixes.begins(item)
            session.computing = item.begun = True
            item.begin(item)

    def _reserve(self, session: EngineSession) -> None:
        """Tell the executor for how many tokens the session has room."""
        room = session.allocation.room
        if room != session.reserved:
            self._prefixes.shrink(self._kv_cache.free)
        for sequence, old, new in zip(session.sequences, session.reserved, room, strict=True):
            if old != new:
                self._executor.reserve(sequence, new)
        session.reserved = room

    # --- batches -----------------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch[SessionStep]:
        """The next batch; until `finish_batch`, its sessions keep their cache whatever happens to them."""
        batch = self._scheduler.schedule(now)
        for step in batch.expired:
            self.fail(step, deadline_error(step), now)
        for step, chunk in zip(batch.steps, batch.chunks, strict=True):
            step.session.computing = True
            if chunk.first_row == 0:
                if step.sources:
                    step.session.reorder(step)
                self._prefixes.begins(step)
                if step.decode:
                    self._stats.note_wait(now - step.submitted, now)
        return batch

    def finish_batch(
        self, batch: ScheduledBatch[SessionStep], results: Sequence[Tensor | SwarmError], now: float
    ) -> list[SessionStep]:
        """Take in a batch's results; return the steps that are computed and still have to be encoded."""
        joined = []
        self.note_progress(now)
        for step, chunk, result in zip(batch.steps, batch.chunks, results, strict=True):
            session = step.session
            session.computing = False
            if not isinstance(result, SwarmError):
                session.computed += chunk.tokens
                try:
                    if not step.done:
                        step.put(result)
                except InternalError as exc:
                    log.error("%s", exc)
                    result = exc
            if session.closed:
                self._free(session, now)
            elif step.done:
                self._advance(session, now)
            elif isinstance(result, SwarmError):
                self.fail(step, result, now)
            elif step.finished and (step.whole or step.codec == "raw"):
                self.complete(step, step.result(), now)
            elif step.finished:
                joined.append(step)
        return joined

    def note_progress(self, now: float) -> None:
        """The executor got something done: the time of steps that wait for it begins anew.

        So a slow server still computes the steps that it accepted, and one that hangs fails them in time.
        """
        if now < self._extended_at + EXTENDED_EVERY:
            return
        self._extended_at = now
        for session in self.sessions.values():
            session.extend_deadlines(now)

    def finish_import(self, item: KVImport, error: SwarmError | None, now: float) -> None:
        """The executor has taken in a piece of cache, or failed to."""
        self.resume(item.session, now)
        self.note_progress(now)
        if error is not None:
            self.fail(item, error, now)
        elif not item.done:
            if item.source is None:
                item.session.computed += item.rows
            self._finish(item)
            resolve(item.answer, None)
            self._advance(item.session, now)

    def pause(self, session: EngineSession) -> None:
        """Keep the session's caches as they are until `resume`; its steps wait meanwhile.

        Raise `InvalidStepError` while it has steps in the queue.
        """
        if session.queue or session.computing:
            name = session.name[:8]
            raise InvalidStepError(f"session {name} has queued steps; its caches are exported after these")
        session.computing = True
        session.allocation.idle_since = None

    def resume(self, session: EngineSession, now: float) -> None:
        """The executor no longer works on the session's caches."""
        session.computing = False
        if session.closed:
            self._free(session, now)
        else:
            self._advance(session, now)

    # --- what the budget decides, and time ---------------------------------------------------------------

    def poll(self, now: float) -> None:
        """Carry out what has become possible in the cache."""
        while outcomes := self._kv_cache.poll(now):
            self._apply_outcomes(outcomes, now)

    def tick(self, now: float) -> None:
        """End what is overdue."""
        self._apply_outcomes(self._kv_cache.expire(now), now)
        for session in list(self.sessions.values()):
            for item in [item for item in session.queue if item.deadline <= now]:
                self.fail(item, deadline_error(item), now)
        self.poll(now)
        self.wakeup = min(
            (item.deadline for s in self.sessions.values() for item in s.queue), default=math.inf
        )
        self._wake_by(self._kv_cache.next_wakeup(now))

    def _wake_by(self, when: float | None) -> None:
        if when is not None and when < self.wakeup:
            self.wakeup = when

    def _apply_outcomes(self, outcomes: Iterable[Outcome], now: float) -> None:
        for outcome in outcomes:
            match outcome:
                case Admitted(request, allocation):
                    self._admit(request, allocation, now)
                case Grown(allocation):
                    session = self.sessions[allocation.session]
                    assert session.active is not None
                    self._start(session, session.active)
                case Refused(AdmissionRequest(session=name), error):
                    self._stats.refusals += 1
                    reject(self.opening[name].answer, error)
                case Refused(GrowthRequest(allocation=allocation), error):
                    self._stats.refusals += 1
                    item = self.sessions[allocation.session].active
                    assert item is not None
                    self.fail(item, error, now)
                case Evicted(allocation, lost):
                    self._stats.sessions_evicted += 1
                    log.info("%s", lost)
                    self._end(self.sessions[allocation.session], lost, now)

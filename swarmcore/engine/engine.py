"""The engine of a server: sessions in, batches out. A thin asyncio driver around plain objects.

`KVCacheManager` says who gets cache, `Scheduler` what runs next, `SessionManager` joins them. The engine
checks what clients claim, runs the batches on a `BlockExecutor` and keeps the time.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Collection, Sequence
from functools import partial
from typing import Any, Literal

from swarmcore.engine import validation
from swarmcore.engine.batch_window import BatchWindow
from swarmcore.engine.kv_cache_manager import KVCacheManager
from swarmcore.engine.kv_transfer import KVChunk, KVTransfer
from swarmcore.engine.loop import BatchLoop
from swarmcore.engine.prefix_cache import PrefixCache, PrefixScope
from swarmcore.engine.scheduler import Scheduler
from swarmcore.engine.session import PendingTokens, QueueItem, SessionStep
from swarmcore.engine.session_manager import SessionManager
from swarmcore.engine.session_prefixes import SessionPrefixes
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training import TrainingLimits, TrainingRunner
from swarmcore.errors import InputError, InvalidStepError, RemoteFaultError, SessionLostError, SwarmError
from swarmcore.executor.base import Adapter, BlockExecutor
from swarmcore.tasks import loop_time
from swarmcore.types import Span
from swarmcore.wire.prefix_names import NAMED_TOKENS
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0
"""Seconds that `Engine.close` lets the running batch finish."""


class Engine:
    """Runs the steps of many sessions on one executor, batched together.

    ``cache_tokens`` is the attention cache to share out, in tokens through the span that the executor has
    now (it may change); ``max_batch_tokens`` bounds a batch, and with it the time that a decode step waits
    for someone's prefill. A session idle for ``idle_timeout`` seconds is ended, or for ``idle_grace`` seconds
    when another one needs its room. The executor stays the caller's to close.
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
        named_tokens: int = NAMED_TOKENS,
        training_limits: TrainingLimits | None = None,
    ) -> None:
        self.executor = executor
        self.max_sequences = min(max_sequences, executor.max_sequences or max_sequences)
        """Most sequences of one session."""
        self.max_step_tokens = max_step_tokens
        """Most tokens of one step."""
        self.stats = EngineStats()
        self._kv_cache = KVCacheManager(
            cache_tokens,
            executor.page,
            blocks=len(executor.span),
            idle_timeout=idle_timeout,
            idle_grace=idle_grace,
            max_sessions=max_sessions,
        )
        self.prefixes = PrefixCache(
            executor, self._kv_cache.pages, blocks=self._kv_cache.blocks, named_tokens=named_tokens
        )
        """What sessions may begin with, and what is kept of those that have ended."""
        self._scheduler: Scheduler[SessionStep] = Scheduler(max_batch_tokens)
        pending = PendingTokens(max_steps=max_pending_steps, max_tokens=max_pending_tokens)
        self._prefixes = prefixes = SessionPrefixes(executor, self.prefixes)
        self._sessions = SessionManager(
            executor, self._kv_cache, self._scheduler, pending, prefixes, self.stats
        )
        self._transfer = KVTransfer(executor, self._sessions, prefixes, self._carry_on, self._answered)
        self._window = BatchWindow()
        self.training = TrainingRunner(
            executor, self.stats, training_limits or TrainingLimits(), lambda: self._batches.wake()
        )
        """Forward and backward passes, which go after interactive steps: see `TrainingRunner.admit`."""
        worker = self.training.worker
        self._batches = BatchLoop(
            executor, self._sessions, self._scheduler, self._window, self.stats, worker, self._carry_on
        )
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions.sessions)

    @property
    def cache_tokens(self) -> int:
        """The whole attention cache, in tokens of the span as it is now; the memory is always the same."""
        return self._in_tokens(self._kv_cache.pages)

    @property
    def cache_tokens_free(self) -> int:
        return self._in_tokens(self._kv_cache.free)

    @property
    def cache_tokens_used(self) -> int:
        return self._in_tokens(self._kv_cache.held)

    @property
    def cache_pages(self) -> tuple[int, int]:
        """Pages that sessions hold, and all that there are."""
        return self._kv_cache.held, self._kv_cache.pages

    def _in_tokens(self, pages: int) -> int:
        return self._kv_cache.tokens(pages, len(self.executor.span))

    @property
    def queue_seconds(self) -> float:
        """How long a decode step waits before it is computed, on average of late; fades when none comes."""
        return self.stats.queue_seconds_at(loop_time())

    @property
    def counters(self) -> dict[str, float]:
        """What has happened since the start, by name."""
        return {
            **self.stats.counters(),
            **self.prefixes.counters(),
            "cache_pages": self._kv_cache.pages,
            "cache_pages_used": self._kv_cache.held,
        }

    def length(self, session: str) -> tuple[int, ...]:
        """Cached tokens of each sequence, of steps that are done. Raise `SessionLostError`."""
        return tuple(self._sessions[session].lengths)

    @property
    def work(self) -> int:
        """Grows with every batch, unit of a pass and piece of cache that is dealt with."""
        return self.stats.batches + self.stats.pass_units + self._transfer.chunks

    def progress(self, session: str) -> tuple[int, bool]:
        """Rows computed so far, and whether a step waits for room in the cache. Raise `SessionLostError`."""
        found = self._sessions[session]
        return found.computed, found.allocation.growth is not None

    def __repr__(self) -> str:
        return (
            f"<Engine {self.executor.span} · {self.sessions} sessions · cache "
            f"{self.cache_tokens_used}/{self.cache_tokens} · {self._sessions.pending.tokens} tokens "
            f"pending · {self.stats.steps} steps in {self.stats.batches} batches · "
            f"{len(self.training.queue)} passes>"
        )

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to compute."""
        self._task = asyncio.create_task(self._batches.run(), name="swarmcore engine")
        self._task.add_done_callback(self._compute_ended)

    async def close(self) -> None:
        """End every session and stop; the batch that runs is waited for. Harmless when repeated."""
        self._stop(SessionLostError("the session was ended: the server is shutting down"))
        if self._task is not None:
            # A batch cannot be interrupted; leaving while it computes would free memory under it.
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT)
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._transfer.finish(CLOSE_TIMEOUT)

    def _stop(self, error: SwarmError) -> None:
        self._closing = True
        self._sessions.close_all(error, validation.draining(), loop_time())
        self._prefixes.forget_outside(None)
        self.training.stop(validation.draining())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._batches.stop()

    def _compute_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the engine stopped on an unexpected error", exc_info=error)
            self._stop(RemoteFaultError("the server's engine has stopped; its log has the traceback"))

    # --- what callers ask for ----------------------------------------------------------------------------

    async def open(
        self,
        session: str,
        sequences: int,
        tokens: int,
        timeout: float,
        span: Span | None = None,
        adapter: Adapter | None = None,
        caller: str = "",
        names: Sequence[bytes] = (),
        scope: PrefixScope | None = None,
    ) -> tuple[int, ...]:
        """Admit a session of ``sequences`` sequences, with ``tokens`` of cache (over all of them) set aside.

        Its steps go through the blocks ``span``, by default all that the executor has. A session that passes
        through a part of them is charged that part of its tokens, in whole pages. All are computed with
        ``adapter``, whose prefix takes room in every sequence besides its tokens.

        Wait up to ``timeout`` seconds for that room, first come first served; raise `CacheFullError`, with
        its ``retry_after``, when it does not come free or never could. ``caller`` is whose share of the cache
        it counts in while others wait. Beyond ``tokens`` the session grows as it goes. Raise `SpanError` for
        blocks that are not here, `InputError` for numbers that make no sense.

        Return how many tokens each sequence begins with: as many as pages called by the first of its
        ``names`` (`swarmcore.wire.prefix_names`) are here within ``scope``, computed before. Its first
        step may begin there, or at any position below. What it computes is found by its names in turn.
        """
        if self._closing:
            raise validation.draining()
        if session in self._sessions.sessions or session in self._sessions.opening:
            raise InputError(f"session {session[:8]} is open already; choose a new random name for a new one")
        validation.check_session(sequences, self.max_sequences, tokens)
        span = span or self.executor.span
        validation.check_held(span, self.executor.span)
        now = loop_time()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        deadline = now + validation.check_timeout(timeout)
        self._sessions.request(session, span, sequences, tokens, answer, deadline, now, adapter, caller)
        self._carry_on()
        try:
            await answer
            validation.check_held(span, self.executor.span)  # which may have changed in the meantime
            if names and self.prefixes.enabled:
                await self._transfer.begin_with(
                    self._sessions[session], scope or PrefixScope(caller, span), names
                )
            return self.length(session)
        except BaseException:
            self._sessions.withdraw(session, loop_time())
            self._carry_on()
            raise
        finally:
            del self._sessions.opening[session]

    def name_prefixes(self, session: str, names: Sequence[bytes]) -> None:
        """What a session's client calls the pages of its sequences by now, so that they are found later.

        Names of pages that have others already are passed over. Raise `SessionLostError`.
        """
        self._prefixes.rename(self._sessions[session], names)

    def forget_prefixes(self, keep: Span | None = None) -> None:
        """Let go of what is kept of blocks outside of ``keep``: the executor is about to drop them."""
        self._prefixes.forget_outside(keep)

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
        sources: Sequence[int] = (),
    ) -> asyncio.Future[Tensor]:
        """Put a step in its session's queue; the future is its result, ``[rows, hidden size]`` in ``codec``.

        ``starts`` and ``lengths`` have an entry for each sequence; ``hidden`` holds ``lengths[0]`` rows of
        the first, and so on. A sequence of length 0 is left alone; a start below its length rolls it back.
        ``reply`` asks for every row, or for the last row of each sequence that has any. With ``sources``, for
        beam search, sequence ``i`` first becomes a copy of what sequence ``sources[i]`` was; ``starts`` count
        from there.

        Steps of a session run in the order of the calls, so the next may be queued before the result of
        the one before it is there. Cancelling the future withdraws the step. What is wrong with a step raises
        here, at once: `SessionLostError`, `InvalidStepError`, `UnknownCodecError`, and `TooManyCallsError`
        when too much waits. The future raises `DeadlineExceededError` after ``timeout`` seconds in which
        the engine got nothing done, `CacheFullError` when there was no room for it in that time,
        `SessionLostError` when the session was ended, or the executor's own error. The session is then as
        long as it was before the step, but for sequences that the step had begun to roll back: those end at
        the step's start. Queued steps that build on the failed one fail like it. A step that fails when its
        caches have been reordered ends the session with `SessionLostError`: what it holds is not what its
        client takes it for.
        """
        found = self._sessions[session]
        try:
            segments = found.segments(starts, lengths, sources)
            rows, width = sum(lengths), self.executor.model.hidden_size
            validation.check_hidden(hidden, rows, width, self.max_step_tokens)
            validation.check_reply(reply, codec)
            self._sessions.pending.check(found, rows)
            now = loop_time()
            timeout = validation.check_timeout(timeout)
        except SwarmError:
            self.stats.refusals += 1
            raise
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        order = () if list(sources) == list(range(len(sources))) else tuple(sources)
        step = SessionStep(
            found.span,
            segments,
            hidden,
            reply,
            codec,
            now + timeout,
            order,
            adapter=found.adapter,
            session=found,
            answer=answer,
            submitted=now,
            timeout=timeout,
        )
        answer.add_done_callback(partial(self._answered, step))
        if step.decode:
            self._window.arrived(session, now, found.span)
        self._sessions.submit(step, now)
        self._carry_on()
        return answer

    def withdraw(self, session: str, steps: Collection[asyncio.Future[Tensor]]) -> None:
        """Have those of ``steps`` of a session fail, at once, of which there is anything left to compute."""
        now = loop_time()
        for item in list(self._sessions[session].queue):
            if isinstance(item, SessionStep) and item.left and item.answer in steps:
                self._sessions.fail(item, InvalidStepError("the step was withdrawn by its caller"), now)
        self._sessions.poll(now)
        self._carry_on()

    def export_cache(self, session: str, *, max_bytes: int) -> AsyncGenerator[KVChunk, None]:
        """The session's attention cache, in chunks whose tensors take ``max_bytes`` at most.

        Sequence by sequence, each from its start. The session cannot be evicted meanwhile, and its steps wait
        until the iterator is exhausted or closed; other sessions go on. Raise `SessionLostError` when there
        is no such session or it ends, `InputError` when not one token fits in a chunk; `InvalidStepError`
        at the first chunk while steps of the session are queued.
        """
        return self._transfer.export(self._sessions[session], max_bytes)

    async def import_cache(
        self,
        session: str,
        sequence: int,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        *,
        timeout: float,
    ) -> None:
        """Put a `KVChunk` of another server's session for the same blocks into this one.

        It stands in the session's queue like a step of ``count`` tokens at ``start`` would, needs the same
        room, and raises the same: `SessionLostError`, `InvalidStepError` (also for tensors of another layout
        or dtype), `TooManyCallsError`; `DeadlineExceededError` or `CacheFullError` after ``timeout`` seconds.
        When it fails the sequence ends at ``start``.
        """
        found = self._sessions[session]
        segment = found.segment(sequence, start, count)
        self._sessions.pending.check(found, count)
        answer = self._transfer.submit(found, segment, validation.check_timeout(timeout), tensors)
        self._carry_on()
        await answer

    def close_session(self, session: str) -> None:
        """End a session and free its cache: at once, or after the batch that it computes in. Never fails."""
        self._window.closed(session)
        self._sessions.close(session, loop_time())
        self._carry_on()

    def _answered(self, item: QueueItem, answer: asyncio.Future[Any]) -> None:
        if item.done:
            return
        # Nobody but the caller ends the future of a step that is not done: it was cancelled.
        now = loop_time()
        self._sessions.fail(item, InvalidStepError("the step was cancelled by its caller"), now)
        self._sessions.poll(now)
        self._carry_on()

    def _carry_on(self) -> None:
        """After every change of the sessions: have the batches run, and the timer set."""
        if self._closing:
            return
        if len(self._scheduler):
            self._batches.wake()
        when = self._sessions.wakeup
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
            self._timer = None
        if when < math.inf:
            self._timer = asyncio.get_running_loop().call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._sessions.tick(loop_time())
        self._carry_on()

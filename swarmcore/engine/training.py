"""Forward and backward passes on an engine: admitted, put in line, computed a unit at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

import attrs

from swarmcore.engine.activations import ActivationStore
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training_queue import Pacing, QueuedPass, TrainingQueue
from swarmcore.engine.training_turn import TrainingRequest
from swarmcore.engine.validation import check_held, check_timeout, draining
from swarmcore.errors import (
    DeadlineExceededError,
    InvalidBatchError,
    ServerDrainingError,
    ServerMemoryError,
    SwarmError,
)
from swarmcore.executor.base import BackwardPass, BlockExecutor, ForwardPass, TrainingBatch, executor_error
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)


@attrs.define(kw_only=True)
class TrainingLimits:
    """What an engine allows forward and backward passes."""

    max_tokens: int = 8192
    """Most tokens of one pass; 0 when none are run."""
    queue_factor: int = 16
    """So many times as many are admitted at once, of all callers together; half of them of one caller."""
    max_under_way: int = 4
    """Most passes that are begun at a time."""
    activation_budget: int = 256 * 2**20
    """Bytes of activations of passes under way, and of those kept for backward passes to come.

    A pass that does not fit waits for its turn; one of several sequences that never would goes through in
    parts. With 0 nothing is kept, and backward passes go a sequence at a time, one pass after the other.
    """
    activation_ttl: float = 120.0
    """Seconds for which activations are kept at most."""


class TrainingRunner:
    """Runs passes between the batches of interactive steps; see `Engine.training`."""

    def __init__(
        self, executor: BlockExecutor, stats: EngineStats, limits: TrainingLimits, wake: Callable[[], None]
    ) -> None:
        """``wake`` is called when there is something to compute."""
        self.limits = limits
        self.pacing = Pacing()
        self.kept = ActivationStore(limits.activation_budget, ttl=limits.activation_ttl)
        self.queue = TrainingQueue(
            max_under_way=limits.max_under_way, max_tokens=limits.max_tokens * limits.queue_factor
        )
        self._executor = executor
        self._stats = stats
        self._wake = wake
        self._computing: QueuedPass | None = None
        self._turns: dict[TrainingRequest, None] = {}
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def under_way_bytes(self) -> int:
        """Memory of the activations of passes that compute, or are about to."""
        return sum(turn.nbytes for turn in self._turns)

    def admit(self, caller: str, span: Span, lengths: tuple[int, ...], timeout: float) -> TrainingRequest:
        """Set room aside for a pass; use what is returned as a context manager, for as long as it takes.

        The pass is to be over ``timeout`` seconds from now. Raise `InvalidBatchError` for lengths that make
        no batch or are above `TrainingLimits.max_tokens`, `SpanError` for blocks that are not here,
        `TooManyCallsError` when too many tokens are admitted already.
        """
        tokens, limit = sum(lengths), self.limits.max_tokens
        if self._closing:
            raise draining()
        try:
            if not lengths or min(lengths) < 1:
                raise InvalidBatchError("the batch has no tokens, or a sequence of it has none; leave it out")
            if not limit:
                raise InvalidBatchError(
                    "this server runs no forward and backward passes; use another one", pass_tokens=0
                )
            if tokens > limit:
                raise InvalidBatchError(
                    f"a batch of {tokens} tokens; this server runs {limit} at most: send smaller "
                    f"micro-batches",
                    pass_tokens=limit,
                )
            check_held(span, self._executor.span)
            return TrainingRequest(self, caller, span, lengths, _now() + check_timeout(timeout))
        except SwarmError:
            self._stats.passes_refused += 1
            raise

    async def drain(self, keep: Span | None = None) -> None:
        """Wait until no pass needs blocks outside of ``keep``; refusing new ones is the caller's business.

        Activations of such blocks are forgotten: no pass is to come that could use them.
        """
        self.kept.clear(keep)
        await self._until(lambda: not self._leaving(keep))

    async def end(self, keep: Span | None = None) -> None:
        """End passes that need blocks outside of ``keep``, and forget activations of such blocks."""
        for turn in self._leaving(keep):
            turn.end(ServerDrainingError("the pass was ended: this server had to let go of its blocks"))
        self.kept.clear(keep)
        await self._until(lambda: not self._holds_outside(keep))

    def stop(self, error: SwarmError) -> None:
        """End everything; the unit that computes is to be waited for."""
        self._closing = True
        for turn in self._turns:
            turn.end(executor_error(error))
        self.kept.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leaving(self, keep: Span | None) -> list[TrainingRequest]:
        return [turn for turn in self._turns if _outside(turn.span, keep)]

    def _holds_outside(self, keep: Span | None) -> bool:
        # A unit that computes outlives the turn that was cancelled.
        computing = self._computing is not None and _outside(self._computing.span, keep)
        return computing or any(turn.working for turn in self._leaving(keep))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # --- what the engine's loop asks for -----------------------------------------------------------------

    async def run_unit(self) -> None:
        """Compute one unit of the pass whose turn it is, if there is any."""
        queued = self.queue.next(self._fits)
        if queued is None:
            return
        began = _now()
        limit = self.pacing.unit_tokens(queued.kind, queued.lengths, self._stats.decode_seconds, began)
        queued.begun = queued.running = True
        if queued.saves and self._set_aside(queued):
            limit = min(limit, self.kept.tokens_within(queued.nbytes, queued.span))
        self._computing = queued
        try:
            last = await queued.work.advance(limit)
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                log.exception("the executor failed on a %s pass of %d tokens", queued.kind, queued.tokens)
            queued.fail(executor_error(exc))
            last = True
        finally:
            queued.running, self._computing = False, None
            if queued.abandoned:
                queued.work.close()
        seconds = _now() - began
        self.kept.learn(queued.work)
        self.queue.charge(queued, seconds)
        self.pacing.note_unit(queued.kind, queued.lengths, limit, seconds)
        self._stats.note_unit(seconds)
        if last:
            self.queue.remove(queued)
            if not queued.answer.done():
                queued.answer.set_result(None)
        self._changed.set()

    def _fits(self, queued: QueuedPass) -> bool:
        """Whether it may begin. What is kept makes room for what is to be kept; and where nothing else would
        go on."""
        if not queued.saves or not self.queue.under_way:
            return True
        kept = 0 if queued.kind == "forward" else self.kept.nbytes
        return self.kept.known and self._least(queued) + self.under_way_bytes + kept <= self.kept.budget

    def _set_aside(self, queued: QueuedPass) -> bool:
        """Room for what it saves: for the whole pass if that is free, for a part of it at a time if not.

        A forward pass of which not everything can be kept goes on without keeping any; False then.
        """
        others = self.under_way_bytes - queued.nbytes
        free = self.kept.budget - self.kept.nbytes - others
        whole = self.kept.estimate(queued.tokens, queued.span)
        if isinstance(queued.work, ForwardPass) and whole > self.kept.budget:
            queued.work.forget()
            queued.saves, queued.nbytes = False, 0
            return False
        queued.nbytes = max(self._least(queued), min(whole, free))
        self.kept.make_room(others + queued.nbytes)
        return True

    def _least(self, queued: QueuedPass) -> int:
        # Of a forward pass everything is to be kept; a backward pass can go sequence by sequence.
        tokens = queued.tokens if queued.kind == "forward" else max(queued.lengths)
        return self.kept.estimate(tokens, queued.span)

    # --- what turns ask for ------------------------------------------------------------------------------

    def entered(self, turn: TrainingRequest) -> None:
        """A turn begins."""
        self._turns[turn] = None

    def left(self, turn: TrainingRequest) -> None:
        """It is over."""
        del self._turns[turn]
        self._changed.set()

    def begin_forward(self, batch: TrainingBatch, *, keep: bool) -> ForwardPass:
        """As `BlockExecutor.forward`."""
        with _translating():
            return self._executor.forward(batch, keep=keep)

    def begin_backward(
        self,
        batch: TrainingBatch,
        gradients: Tensor,
        kept: ForwardPass | None,
        *,
        inputs: bool,
        weights: bool,
    ) -> BackwardPass:
        """As `BlockExecutor.backward`. Raise `ServerMemoryError` when a sequence is above the budget."""
        longest = max(batch.lengths)
        needed, budget = self.kept.estimate(longest, batch.span), self.kept.budget
        if kept is None and 0 < budget < needed:
            self._stats.passes_refused += 1
            raise ServerMemoryError(
                f"the activations of a sequence of {longest} tokens in {len(batch.span)} blocks take about "
                f"{needed / 2**20:.0f} MiB, and this server has {budget / 2**20:.0f} MiB for them: send "
                f"shorter sequences, or use servers with fewer blocks or a larger --activation-budget"
            )
        with _translating():
            return self._executor.backward(batch, gradients, kept=kept, inputs=inputs, weights=weights)

    async def compute(self, queued: QueuedPass, clock: asyncio.Timeout) -> None:
        """Have a pass run to its end; it is closed if it does not get there before ``clock`` ends it."""
        self.queue.add(queued)
        self._wake()
        try:
            async with clock:
                await queued.answer
        except BaseException as exc:
            self._stats.passes_failed += 1
            self._abandon(queued)
            if isinstance(exc, TimeoutError) and clock.expired():
                raise _too_late(queued) from exc
            raise
        self._stats.note_pass(queued.kind, queued.tokens)

    def _abandon(self, queued: QueuedPass) -> None:
        self.queue.remove(queued)
        queued.abandoned = True
        if not queued.running:
            queued.work.close()
        self._changed.set()

    def keep(self, caller: str, name: str, batch: TrainingBatch, forward: ForwardPass) -> bool:
        """As `ActivationStore.keep`."""
        kept = self.kept.keep(caller, name, batch, forward, _now(), under_way=self.under_way_bytes)
        self._watch_expiry()
        return kept

    def take(self, caller: str, name: str, batch: TrainingBatch) -> ForwardPass | None:
        """As `ActivationStore.take`."""
        found = self.kept.take(caller, name, batch, _now())
        if found is not None:
            self._stats.kept_hits += 1
        else:
            self._stats.kept_misses += 1
        return found

    def _watch_expiry(self) -> None:
        when = self.kept.next_expiry()
        if when is not None and self._timer is None and not self._closing:
            self._timer = asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.kept.expire(_now())
        self._watch_expiry()

    def __repr__(self) -> str:
        return f"<TrainingRunner {self.queue!r} · {self.under_way_bytes} bytes under way · {self.kept!r}>"


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except SwarmError:
        raise
    except Exception as exc:
        log.exception("the executor failed to begin a pass")
        raise executor_error(exc) from exc


def _outside(span: Span, keep: Span | None) -> bool:
    return keep is None or not keep.start <= span.start < span.end <= keep.end


def _too_late(queued: QueuedPass) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the {queued.kind} pass of {queued.tokens} tokens was not through by its deadline, with "
        f"{queued.work.seconds:.3g} s of work done; send smaller batches, or allow it more time"
    )


def _now() -> float:
    return asyncio.get_running_loop().time()

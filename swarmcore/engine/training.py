"""Forward and backward passes on an engine: who may have one computed, from its admission to its results."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

import attrs

from swarmcore.engine.activations import ActivationStore
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training_queue import QueuedPass, TrainingQueue
from swarmcore.engine.training_worker import TrainingWorker
from swarmcore.engine.validation import check_held, check_timeout, draining
from swarmcore.errors import InvalidBatchError, ServerDrainingError, SwarmError
from swarmcore.executor.base import (
    BackwardPass,
    BlockExecutor,
    ForwardPass,
    PassKind,
    TrainingBatch,
    TrainingPass,
    executor_error,
)
from swarmcore.tasks import loop_time
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


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


class TrainingRequest:
    """Room for one pass of one caller; within it `forward` or `backward` may be called, once."""

    def __init__(
        self,
        worker: TrainingWorker,
        caller: str,
        span: Span,
        lengths: tuple[int, ...],
        deadline: float,
        ended: Callable[[TrainingRequest], None],
    ) -> None:
        """``ended`` is called when it is over."""
        self.caller = caller
        self.span = span
        self.lengths = lengths
        self.deadline = deadline
        """Loop time."""
        self.clock: asyncio.Timeout | None = None
        """Ends the computation at the deadline."""
        self._worker = worker
        self._kept: ForwardPass | None = None
        self._queued: QueuedPass | None = None
        self._error: SwarmError | None = None
        self._when_ended = ended

    @property
    def working(self) -> bool:
        """Whether the executor holds anything for it, a unit that computes aside."""
        return self._queued is not None and not self._queued.abandoned

    @property
    def nbytes(self) -> int:
        """Memory of activations that it holds, or that is set aside for them."""
        if self._kept is not None:
            return self._kept.kept_bytes
        return 0 if self._queued is None else self._queued.nbytes

    def reuse(self, name: str, batch: TrainingBatch) -> bool:
        """Whether activations are here that the caller had kept as ``name``; they are for `backward` then.

        They are not used for another batch than this one, of which the rows are not looked at.
        """
        self._kept = self._worker.take(self.caller, name, batch) if name else None
        return self._kept is not None

    async def forward(self, batch: TrainingBatch, *, keep: str = "") -> tuple[Tensor, bool, float]:
        """Return the outputs, raw; whether activations are kept as ``keep``; and the seconds of work.

        Raise `InvalidBatchError` for rows that are wrong, `ServerMemoryError`, `DeadlineExceededError`,
        `ServerDrainingError`. Cancelled, it leaves nothing behind.
        """
        self._raise_if_failed()
        saves = bool(keep) and self._worker.activations.worth_keeping(batch)
        work = self._worker.begin_forward(batch, keep=saves)
        await self._compute("forward", work, saves=saves)
        outputs = work.outputs
        kept = work.kept_bytes > 0 and self._worker.keep(self.caller, keep, batch, work)
        if not kept:
            work.close()
        return outputs, kept, work.seconds

    async def backward(
        self, batch: TrainingBatch, gradients: Tensor, *, inputs: bool = True, weights: bool = False
    ) -> BackwardPass:
        """Return the pass, through and closed, with its results. Raise as `forward` does."""
        self._raise_if_failed()
        work = self._worker.begin_backward(batch, gradients, self._kept, inputs=inputs, weights=weights)
        nbytes, saves = self.nbytes, self._kept is None
        self._kept = None  # it is the pass's now
        await self._compute("backward", work, saves=saves, nbytes=nbytes)
        work.close()
        return work

    async def _compute(self, kind: PassKind, work: TrainingPass, *, saves: bool, nbytes: int = 0) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queued = QueuedPass(
            caller=self.caller,
            kind=kind,
            span=self.span,
            lengths=self.lengths,
            work=work,
            answer=answer,
            saves=saves,
            nbytes=nbytes,
        )
        self.clock = asyncio.timeout_at(self.deadline)
        await self._worker.compute(self._queued, self.clock)
        self.clock = self._queued = None
        if self._error is not None:  # in the very moment that it was through
            work.close()
            raise self._error

    def extend(self, deadline: float) -> None:
        """Move its deadline, since there was progress."""
        self.deadline = deadline
        if self.clock is not None and not self.clock.expired():
            with contextlib.suppress(RuntimeError):  # it is just ending
                self.clock.reschedule(deadline)

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def fail(self, error: SwarmError) -> None:
        """It fails with ``error``, now or when it is about to compute."""
        self._error = error
        self._close_kept()
        if self._queued is not None:
            self._queued.fail(error)

    def _close_kept(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_kept()
        self._when_ended(self)


class TrainingRunner:
    """Admits forward and backward passes, and ends them when their blocks leave; see `Engine.training`."""

    def __init__(
        self, executor: BlockExecutor, stats: EngineStats, limits: TrainingLimits, wake: Callable[[], None]
    ) -> None:
        """``wake`` is called when there is something to compute."""
        self.limits = limits
        self.activations = ActivationStore(limits.activation_budget, ttl=limits.activation_ttl)
        self.queue = TrainingQueue(
            max_under_way=limits.max_under_way, max_tokens=limits.max_tokens * limits.queue_factor
        )
        self.worker = TrainingWorker(
            executor, stats, self.queue, self.activations, wake, lambda: self.under_way_bytes
        )
        self._executor = executor
        self._stats = stats
        self._requests: dict[TrainingRequest, None] = {}
        self._closing = False

    @property
    def under_way_bytes(self) -> int:
        """Memory of the activations of passes that compute, or are about to."""
        return sum(request.nbytes for request in self._requests)

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
            deadline = loop_time() + check_timeout(timeout)
            self.queue.admit(caller, tokens)
        except SwarmError:
            self._stats.passes_refused += 1
            raise
        request = TrainingRequest(self.worker, caller, span, lengths, deadline, self._end)
        self._requests[request] = None
        return request

    def _end(self, request: TrainingRequest) -> None:
        self.queue.leave(request.caller, sum(request.lengths))
        del self._requests[request]
        self.worker.changed.set()

    async def drain(self, keep: Span | None = None) -> None:
        """Wait until no pass needs blocks outside of ``keep``; refusing new ones is the caller's business.

        Activations of such blocks are forgotten: no pass is to come that could use them.
        """
        self.activations.clear(keep)
        await self._until(lambda: not self._leaving(keep))

    async def end(self, keep: Span | None = None) -> None:
        """End passes that need blocks outside of ``keep``, and forget activations of such blocks."""
        for request in self._leaving(keep):
            request.fail(ServerDrainingError("the pass was ended: this server had to let go of its blocks"))
        self.activations.clear(keep)
        await self._until(lambda: not self._holds_outside(keep))

    def stop(self, error: SwarmError) -> None:
        """End everything; the unit that computes is to be waited for."""
        self._closing = True
        for request in self._requests:
            request.fail(executor_error(error))
        self.worker.stop()

    def _leaving(self, keep: Span | None) -> list[TrainingRequest]:
        return [request for request in self._requests if not _within(request.span, keep)]

    def _holds_outside(self, keep: Span | None) -> bool:
        # A unit that computes outlives the request that was cancelled.
        computing = self.worker.computing
        if computing is not None and not _within(computing.span, keep):
            return True
        return any(request.working for request in self._leaving(keep))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.worker.changed.clear()
            await self.worker.changed.wait()

    def __repr__(self) -> str:
        return (
            f"<TrainingRunner {self.queue!r} · {self.under_way_bytes} bytes under way · {self.activations!r}>"
        )


def _within(span: Span, keep: Span | None) -> bool:
    return keep is not None and keep.covers(span)

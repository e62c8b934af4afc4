"""One caller's pass on an engine: from the room set aside for it to its results."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Self

from swarmcore.engine.training_queue import Kind, QueuedPass
from swarmcore.errors import SwarmError
from swarmcore.executor.base import BackwardPass, ForwardPass, TrainingBatch, TrainingPass
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

if TYPE_CHECKING:
    from swarmcore.engine.training import TrainingRunner


class TrainingRequest:
    """Room for one pass of one caller; within it `forward` or `backward` may be called, once."""

    def __init__(
        self, runner: TrainingRunner, caller: str, span: Span, lengths: tuple[int, ...], deadline: float
    ) -> None:
        self.caller = caller
        self.span = span
        self.lengths = lengths
        self.deadline = deadline
        """Loop time."""
        self.clock: asyncio.Timeout | None = None
        """Ends the computation at the deadline."""
        self._runner = runner
        self._admission = runner.queue.admit(caller, sum(lengths))
        self._kept: ForwardPass | None = None
        self._queued: QueuedPass | None = None
        self._ended: SwarmError | None = None
        runner.entered(self)

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
        self._kept = self._runner.take(self.caller, name, batch) if name else None
        return self._kept is not None

    async def forward(self, batch: TrainingBatch, *, keep: str = "") -> tuple[Tensor, bool, float]:
        """Return the outputs, raw; whether activations are kept as ``keep``; and the seconds of work.

        Raise `InvalidBatchError` for rows that are wrong, `ServerMemoryError`, `DeadlineExceededError`,
        `ServerDrainingError`. Cancelled, it leaves nothing behind.
        """
        self._check_not_ended()
        saves = bool(keep) and self._runner.kept.worth_keeping(batch)
        work = self._runner.begin_forward(batch, keep=saves)
        await self._compute("forward", work, saves=saves)
        outputs = work.outputs
        kept = work.kept_bytes > 0 and self._runner.keep(self.caller, keep, batch, work)
        if not kept:
            work.close()
        return outputs, kept, work.seconds

    async def backward(
        self, batch: TrainingBatch, gradients: Tensor, *, inputs: bool = True, weights: bool = False
    ) -> BackwardPass:
        """Return the pass, through and closed, with its results. Raise as `forward` does."""
        self._check_not_ended()
        work = self._runner.begin_backward(batch, gradients, self._kept, inputs=inputs, weights=weights)
        nbytes, saves = self.nbytes, self._kept is None
        self._kept = None  # it is the pass's now
        await self._compute("backward", work, saves=saves, nbytes=nbytes)
        work.close()
        return work

    async def _compute(self, kind: Kind, work: TrainingPass, *, saves: bool, nbytes: int = 0) -> None:
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
        await self._runner.compute(self._queued, self.clock)
        self.clock = self._queued = None
        if self._ended is not None:  # in the very moment that it was through
            work.close()
            raise self._ended

    def extend(self, deadline: float) -> None:
        """It gets on: it may take until ``deadline``."""
        self.deadline = deadline
        if self.clock is not None and not self.clock.expired():
            with contextlib.suppress(RuntimeError):  # it is just ending
                self.clock.reschedule(deadline)

    def _check_not_ended(self) -> None:
        if self._ended is not None:
            raise self._ended

    def end(self, error: SwarmError) -> None:
        """It fails with ``error``, now or when it is about to compute."""
        self._ended = error
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
        self._runner.queue.leave(self._admission)
        self._runner.left(self)

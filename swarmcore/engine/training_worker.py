"""Computes forward and backward passes, a unit at a time, between the batches of interactive steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from swarmcore.engine.activations import ActivationStore
from swarmcore.engine.stats import EngineStats
from swarmcore.engine.training_queue import QueuedPass, TrainingPacing, TrainingQueue
from swarmcore.errors import DeadlineExceededError, ServerMemoryError, SwarmError
from swarmcore.executor.base import BackwardPass, BlockExecutor, ForwardPass, TrainingBatch, executor_error
from swarmcore.tasks import Deadline, loop_time
from swarmcore.wire.tensors import Tensor

log = logging.getLogger(__name__)


class TrainingWorker:
    """Begins passes on the executor and has their units run; knows what memory their activations take."""

    def __init__(
        self,
        executor: BlockExecutor,
        stats: EngineStats,
        queue: TrainingQueue,
        activations: ActivationStore,
        wake: Callable[[], None],
        in_use: Callable[[], int],
    ) -> None:
        """``wake`` is called when there is something to compute; ``in_use`` gives the bytes of activations of
        all passes that compute, or are about to."""
        self.queue = queue
        self.activations = activations
        self.pacing = TrainingPacing()
        self.changed = asyncio.Event()
        """Set when a unit has been computed, or a pass was given up."""
        self.computing: QueuedPass | None = None
        self._executor = executor
        self._stats = stats
        self._wake = wake
        self._in_use = in_use
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def stop(self) -> None:
        """Keep no activations any more; the unit that computes is to be waited for."""
        self._closing = True
        self.activations.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def run_unit(self) -> None:
        """Compute one unit of the pass whose turn it is, if there is any."""
        queued = self.queue.next(self._fits)
        if queued is None:
            return
        began = loop_time()
        limit = self.pacing.unit_tokens(queued.kind, queued.lengths, self._stats.decode_seconds, began)
        queued.begun = queued.running = True
        if queued.saves and self._set_aside(queued):
            limit = min(limit, self.activations.tokens_within(queued.nbytes, queued.span))
        self.computing = queued
        try:
            last = await queued.work.advance(limit)
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                log.exception("the executor failed on a %s pass of %d tokens", queued.kind, queued.tokens)
            queued.fail(executor_error(exc))
            last = True
        finally:
            queued.running, self.computing = False, None
            if queued.abandoned:
                queued.work.close()
        seconds = loop_time() - began
        self.activations.learn(queued.work)
        self.queue.charge(queued, seconds)
        self.pacing.note_unit(queued.kind, queued.lengths, limit, seconds)
        self._stats.note_unit(seconds)
        if last:
            self.queue.remove(queued)
            if not queued.answer.done():
                queued.answer.set_result(None)
        self.changed.set()

    def _fits(self, queued: QueuedPass) -> bool:
        """Whether it may begin. What is kept makes room for what is to be kept; and where nothing else would
        go on."""
        if not queued.saves or not self.queue.under_way:
            return True
        kept = 0 if queued.kind == "forward" else self.activations.nbytes
        needed = self._least(queued) + self._in_use() + kept
        return self.activations.known and needed <= self.activations.budget

    def _set_aside(self, queued: QueuedPass) -> bool:
        """Room for what it saves: for the whole pass if that is free, for a part of it at a time if not.

        A forward pass of which not everything can be kept goes on without keeping any; False then.
        """
        others = self._in_use() - queued.nbytes
        free = self.activations.budget - self.activations.nbytes - others
        whole = self.activations.estimate(queued.tokens, queued.span)
        if isinstance(queued.work, ForwardPass) and whole > self.activations.budget:
            queued.work.forget()
            queued.saves, queued.nbytes = False, 0
            return False
        queued.nbytes = max(self._least(queued), min(whole, free))
        self.activations.make_room(others + queued.nbytes)
        return True

    def _least(self, queued: QueuedPass) -> int:
        # Of a forward pass everything is to be kept; a backward pass can go sequence by sequence.
        tokens = queued.tokens if queued.kind == "forward" else max(queued.lengths)
        return self.activations.estimate(tokens, queued.span)

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
        needed, budget = self.activations.estimate(longest, batch.span), self.activations.budget
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
            async with Deadline(clock, lambda: _too_late(queued)):
                await queued.answer
        except BaseException:
            self._stats.passes_failed += 1
            self._abandon(queued)
            raise
        self._stats.note_pass(queued.kind, queued.tokens)

    def _abandon(self, queued: QueuedPass) -> None:
        self.queue.remove(queued)
        queued.abandoned = True
        if not queued.running:
            queued.work.close()
        self.changed.set()

    def keep(self, caller: str, name: str, batch: TrainingBatch, forward: ForwardPass) -> bool:
        """As `ActivationStore.keep`."""
        kept = self.activations.keep(caller, name, batch, forward, loop_time(), under_way=self._in_use())
        self._watch_expiry()
        return kept

    def take(self, caller: str, name: str, batch: TrainingBatch) -> ForwardPass | None:
        """As `ActivationStore.take`."""
        found = self.activations.take(caller, name, batch, loop_time())
        if found is not None:
            self._stats.kept_hits += 1
        else:
            self._stats.kept_misses += 1
        return found

    def _watch_expiry(self) -> None:
        when = self.activations.next_expiry()
        if when is not None and self._timer is None and not self._closing:
            self._timer = asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.activations.expire(loop_time())
        self._watch_expiry()


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except SwarmError:
        raise
    except Exception as exc:
        log.exception("the executor failed to begin a pass")
        raise executor_error(exc) from exc


def _too_late(queued: QueuedPass) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the {queued.kind} pass of {queued.tokens} tokens was not through by its deadline, with "
        f"{queued.work.seconds:.3g} s of work done; send smaller batches, or allow it more time"
    )

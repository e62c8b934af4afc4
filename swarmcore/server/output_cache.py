"""Steps that a session has seen, so that one that comes twice is answered and not computed again.

And outputs that it keeps in case it is asked for them again, by a repeated step or by a replay.

Both are counted for the client, and make room for whatever else peers need.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Generic, Literal, TypeVar

import attrs

from swarmcore.errors import InvalidStepError, ResourceLimitError, SessionLostError
from swarmcore.executor.base import BlockExecutor
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.session.journal import OutputHistory
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import Recall, Replay, Step
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

Answer = TypeVar("Answer")


@attrs.define
class _Seen(Generic[Answer]):
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    answer: Answer | None
    """None when it had to make room."""
    attempt: int


class DedupCache(Generic[Answer]):
    """Remembers the answers of the latest ``depth`` steps; what an answer is, is the caller's business."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._seen: dict[int, _Seen[Answer]] = {}
        self._latest = -1
        self._forgotten = -1

    def __len__(self) -> int:
        """Answers that are remembered."""
        return len(self._seen)

    def outdated(self, step: Step) -> bool:
        """Whether the client has sent this step again since, or is done with it: nobody waits for it."""
        seen = self._seen.get(step.step)
        return step.step <= self._latest if seen is None else step.attempt < seen.attempt

    def repeated(self, step: Step) -> Answer | None:
        """The answer of this step if it came before, else None.

        Raise `InvalidStepError` when its number was used for other tokens, or is too old to be remembered,
        `SessionLostError` when its answer was dropped.
        """
        seen = self._seen.get(step.step)
        if seen is None:
            if step.step <= self._latest:
                raise InvalidStepError(
                    f"step {step.step} came after step {self._latest} and is no longer remembered; "
                    f"send its tokens as a new step"
                )
            return None
        if (seen.starts, seen.lengths, seen.sources) != (step.starts, step.lengths, step.sources):
            raise InvalidStepError(
                f"step {step.step} came again with other positions: {step.starts} + {step.lengths} "
                f"after {seen.starts} + {seen.lengths}"
            )
        if seen.answer is None:
            raise SessionLostError(
                f"the answer to step {step.step} had to make room here, and its tokens cannot be computed "
                f"twice; replay the session"
            )
        seen.attempt = max(seen.attempt, step.attempt)
        return seen.answer

    @property
    def answers(self) -> list[Answer]:
        """The answers that are remembered."""
        return [seen.answer for seen in self._seen.values() if seen.answer is not None]

    def drop_answers(self, which: Callable[[Answer], bool]) -> None:
        """Forget some answers; that their steps came is still known."""
        for seen in self._seen.values():
            if seen.answer is not None and which(seen.answer):
                seen.answer = None

    def remember(self, step: Step, answer: Answer) -> None:
        """Keep the answer of a new step; forget those that are settled, and the oldest one past the depth."""
        self._seen[step.step] = _Seen(step.starts, step.lengths, step.sources, answer, step.attempt)
        self._latest = max(self._latest, step.step)
        for number in [number for number in self._seen if number < step.settled]:
            self._drop(number)
        if len(self._seen) > self._depth:
            self._drop(min(self._seen))

    def forget(self, step: Step) -> None:
        """The step failed: it may be sent again under its number."""
        self._seen.pop(step.step, None)
        self._latest = max(self._seen, default=self._forgotten)

    def recall(self, recall: Recall) -> None:
        """These steps do not come again."""
        for number in [number for number in self._seen if recall.first <= number < recall.end]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        del self._seen[number]
        self._forgotten = max(self._forgotten, number)


RECALLS_REMEMBERED = 64
"""Recalls of one session of which late steps are dropped; those of older ones are computed in vain."""


class RecalledSteps:
    """The steps of one session that its client has called back."""

    def __init__(self) -> None:
        self._recalls: deque[Recall] = deque(maxlen=RECALLS_REMEMBERED)

    def add(self, recall: Recall) -> None:
        self._recalls.append(recall)

    def __contains__(self, step: Step) -> bool:
        """Whether a step is to be dropped: not one that reorders its sequences, nor a replay."""
        if step.replay or step.sources:
            return False
        return any(recall.first <= step.step < recall.end for recall in self._recalls)


STEPS_REMEMBERED = 16
"""Answers kept for steps that come again; more than a client has under way at once."""

Reply = Literal["all", "last"]


class EvictableBytes:
    """Memory of a session that can be done without.

    The oldest makes room first, and it is dropped when it would pass its peer's bound: ``drop`` is called
    then, and has to forget it. What was dropped costs the client a replay, never a wrong result.
    """

    def __init__(self, resources: ResourceManager, peer: PeerId, drop: Callable[[], None]) -> None:
        self.nbytes = 0
        self._resources = resources
        self._peer = peer
        self._drop = drop
        self._reservation: Reservation | None = None

    def resize(self, nbytes: int) -> None:
        """It takes so many bytes from now on. When there is no room for them, it is dropped."""
        if nbytes == self.nbytes:
            return
        try:
            if self._reservation is None:
                self._reservation = self._resources.reserve(
                    self._peer, Resource.BYTES, nbytes, priority=Priority.MEDIUM, evict=self._evicted
                )
            else:
                self._reservation.resize(nbytes, Priority.MEDIUM)
        except ResourceLimitError:
            self.close()
            self._drop()
        else:
            self.nbytes = nbytes

    def close(self) -> None:
        """Nothing is kept any more."""
        self.nbytes = 0
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None

    def _evicted(self) -> None:
        self._reservation, self.nbytes = None, 0
        self._drop()


@attrs.frozen
class _Answer:
    """What a step comes to, and in which form it was asked for."""

    reply: Reply
    codec: str
    output: asyncio.Future[Tensor]

    @property
    def nbytes(self) -> int:
        """Memory that it takes once it is there; before that it is queued work."""
        if not self.output.done() or self.output.cancelled() or self.output.exception() is not None:
            return 0
        return self.output.result().data.nbytes


class AnswerCache:
    """Outputs of a session's latest steps: one that comes again is answered, not computed again."""

    def __init__(self, resources: ResourceManager, client: PeerId, counters: Counter[str]) -> None:
        self._steps: DedupCache[_Answer] = DedupCache(depth=STEPS_REMEMBERED)
        self._counters = counters
        self._bytes = EvictableBytes(resources, client, self._drop)
        self._closed = False

    def outdated(self, step: Step) -> bool:
        """As `DedupCache.outdated`."""
        return self._steps.outdated(step)

    def find(self, step: Step, reply: Reply) -> asyncio.Future[Tensor] | None:
        """The step's output if it came before in that form, else None; raise as `DedupCache.repeated`."""
        answer = self._steps.repeated(step)
        if answer is None or (answer.reply, answer.codec) != (reply, step.output_codec):
            return None
        return asyncio.shield(answer.output)

    def add(self, step: Step, reply: Reply, output: asyncio.Future[Tensor]) -> None:
        """Keep the output of a new step once it is there; a step that fails may come again."""
        self._steps.remember(step, _Answer(reply, step.output_codec, output))
        output.add_done_callback(partial(self._computed, step))

    def recall(self, recall: Recall) -> None:
        """As `DedupCache.recall`."""
        self._steps.recall(recall)
        self._resize()

    def close(self) -> None:
        self._closed = True
        self._bytes.close()
        self._steps.drop_answers(lambda _: True)

    def _computed(self, step: Step, output: asyncio.Future[Tensor]) -> None:
        if output.cancelled() or output.exception() is not None:
            self._steps.forget(step)
        self._resize()

    def _resize(self) -> None:
        if not self._closed:
            self._bytes.resize(sum(answer.nbytes for answer in self._steps.answers))

    def _drop(self) -> None:
        self._counters["answers_dropped"] += 1
        self._steps.drop_answers(lambda answer: answer.nbytes > 0)


class ReplayCache:
    """Outputs of a session that may be sent to a stage that is new to it: its `OutputHistory`."""

    def __init__(
        self,
        sequences: int,
        *,
        executor: BlockExecutor,
        resources: ResourceManager,
        client: PeerId,
        counters: Counter[str],
        limits: Limits,
    ) -> None:
        self._outputs = OutputHistory(sequences)
        self._executor = executor
        self._counters = counters
        self._limits = limits
        self._bytes = EvictableBytes(resources, client, self._drop)

    def add(self, step: Step, output: Tensor) -> None:
        """The output of a step that has been computed and sent on."""
        self._outputs.settle(step.settled)
        self._outputs.keep(step, output, settled=step.replay)
        self._bytes.resize(self._outputs.nbytes)

    def recall(self, recall: Recall) -> None:
        """Nobody will ask for the outputs of these steps."""
        self._outputs.forget(recall.first, recall.end)
        self._bytes.resize(self._outputs.nbytes)

    async def rows(self, order: Replay) -> Tensor:
        """What ``order`` asks for, encoded as it says; decoded and encoded off the event loop.

        Raise `InvalidStepError` for rows that are not here, and for more than can be sent at a time,
        `SessionLostError` when they were dropped.
        """
        # Sequences may share rows, and a row may be all that is left of a tensor: neither is to multiply.
        nbytes = sum(order.lengths) * self._executor.model.hidden_size * ITEM_BYTES[self._executor.dtype]
        if not 0 < nbytes <= self._limits.max_message:
            raise InvalidStepError(
                f"a replay of {sum(order.lengths)} tokens takes {nbytes} bytes; expected 1 to "
                f"{self._limits.max_message}: ask for fewer at a time"
            )
        self._outputs.settle(order.settled)
        tensors = self._outputs.settled.tensors(order.starts, order.lengths)
        if sum(tensor.decoded_nbytes for tensor in tensors) > self._limits.max_decoded:
            raise InvalidStepError("the replay touches too many outputs; ask for fewer tokens at a time")
        decoded = {id(tensor): await self._executor.decode(tensor) for tensor in tensors}
        rows = self._outputs.settled.rows(order.starts, order.lengths, decoded)
        return rows if order.codec == "raw" else await self._executor.encode(rows, order.codec)

    def close(self) -> None:
        self._bytes.close()

    def _drop(self) -> None:
        self._counters["outputs_dropped"] += 1
        self._outputs.drop()

"""Which rows of which steps run in the next batch. A plain object."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import attrs

from swarmcore.engine.step import PendingStep
from swarmcore.errors import InputError
from swarmcore.executor.base import ScheduledChunk
from swarmcore.types import Span

SHORT = 2
"""A prefill with no more rows left than so many batches have is finished before the next one has a turn: of
several that come at once, as when sessions are replayed here, most are through early."""

PREFILL_SHARE = 8
"""One row in so many is kept for prefill, and one batch in so many for a span that has only prefill."""

LONGEST = 1.0
"""Seconds that a batch should take at most."""

SHORTEST = 0.1
DECODES = 4.0
"""While others decode: so many batches of decode steps, but `SHORTEST` seconds at least."""

ACTIVE = 2.0
"""Seconds after a decode step in which others are taken to decode."""

FIRST = 16
"""Rows of the first batch."""

LEAST = 32
"""Rows for which others who decode wait, unless these take longer than `LONGEST`."""

MOST = 2**20

StepT = TypeVar("StepT", bound=PendingStep)


@attrs.define(eq=False)
class ScheduledBatch(Generic[StepT]):
    """What to run in one pass: ``chunks[i]`` is the next chunk of ``steps[i]``."""

    steps: list[StepT] = attrs.field(factory=list)
    chunks: list[ScheduledChunk] = attrs.field(factory=list)
    tokens: int = 0
    expired: list[StepT] = attrs.field(factory=list)
    """Steps dropped because their deadline has passed; they will not run any further."""

    @property
    def decode_only(self) -> bool:
        return all(step.decode for step in self.steps)

    @property
    def prefill_tokens(self) -> int:
        return sum(
            chunk.tokens for step, chunk in zip(self.steps, self.chunks, strict=True) if not step.decode
        )


@attrs.define(eq=False)
class _SpanQueue(Generic[StepT]):
    """The steps that go through one span."""

    # Dictionaries as ordered sets: first come first, and removal does not search.
    decode: dict[StepT, None] = attrs.field(factory=dict)
    prefill: dict[StepT, None] = attrs.field(factory=dict)
    passed_over: int = 0
    """Batches that went to other spans since this one's last."""

    def of(self, step: StepT) -> dict[StepT, None]:
        return self.decode if step.decode else self.prefill

    def urgency(self) -> tuple[int, bool, int]:
        starving = self.passed_over if self.passed_over >= PREFILL_SHARE else 0
        return starving, bool(self.decode), self.passed_over


class Scheduler(Generic[StepT]):
    """Packs pending steps into batches of at most ``max_batch_tokens`` rows, each of one span.

    Decode steps (one token for each sequence) come first, in the order they were added; prefills share what
    is left, long ones a chunk each in turn, and have an eighth of every batch to themselves, so that neither
    kind starves the other. Of several callers, in either kind, the one that was given least rows goes next;
    a short prefill that has begun is finished first. Spans take turns, those with decode steps first; one
    that was passed over eight times comes before all others. A batch holds at most one chunk of a step. Steps
    of one session have to be added one after the other, each when the one before it is done.
    """

    def __init__(self, max_batch_tokens: int = 512) -> None:
        if max_batch_tokens < 2:
            raise InputError(
                f"max_batch_tokens is {max_batch_tokens}; a batch needs room for 2 tokens or more"
            )
        self.max_batch_tokens = max_batch_tokens
        self.prefill_rows = max_batch_tokens
        """Most rows of prefill in the next batch, whatever room there is."""
        self._queues: dict[Span, _SpanQueue[StepT]] = {}
        self._given: dict[str, int] = {}  # rows, of callers with steps in the queue

    def __len__(self) -> int:
        return sum(len(queue.decode) + len(queue.prefill) for queue in self._queues.values())

    @property
    def decode_waiting(self) -> tuple[Span | None, int]:
        """Through which span the next batch goes, and how many decode steps wait for it; 0 when any prefill
        waits."""
        if not self._queues or any(queue.prefill for queue in self._queues.values()):
            return None, 0
        span, queue = self._next()
        return span, len(queue.decode)

    def add(self, step: StepT) -> None:
        """The step may run from now on."""
        queue = self._queues.get(step.span)
        if queue is None:
            queue = self._queues[step.span] = _SpanQueue()
        queue.of(step)[step] = None
        if step.caller not in self._given:  # it starts level with those that are there
            self._given[step.caller] = min(self._given.values(), default=0)

    def remove(self, step: StepT) -> None:
        """Forget the step; harmless when it is not there."""
        if (queue := self._queues.get(step.span)) is not None:
            queue.of(step).pop(step, None)
            self._drop_empty(step.span, queue)

    def schedule(self, now: float) -> ScheduledBatch[StepT]:
        """The next batch. The results of the batch before it must have been put into their steps.

        A step leaves the scheduler with its last chunk. The batch is empty only when nothing is left to run.
        """
        batch: ScheduledBatch[StepT] = ScheduledBatch()
        batch.expired = [s for queue in self._queues.values() for s in _all(queue) if s.deadline <= now]
        for step in batch.expired:
            self.remove(step)
        if not self._queues:
            return batch
        span, queue = self._next()
        for other in self._queues.values():
            other.passed_over += 1
        queue.passed_over = 0
        self._fill(batch, queue)
        self._drop_empty(span, queue)
        callers = {step.caller for queue in self._queues.values() for step in _all(queue)}
        self._given = {caller: rows for caller, rows in self._given.items() if caller in callers}
        return batch

    def _next(self) -> tuple[Span, _SpanQueue[StepT]]:
        """The span whose turn it is."""
        return max(self._queues.items(), key=lambda item: item[1].urgency())

    def _fill(self, batch: ScheduledBatch[StepT], queue: _SpanQueue[StepT]) -> None:
        kept = max(self.max_batch_tokens // PREFILL_SHARE, 1) if queue.prefill else 0
        for step in self._in_turn(queue.decode):
            room = self.max_batch_tokens - kept - batch.tokens
            # A decode step runs in one piece unless it is wider than a batch; cutting it would only delay it.
            if step.left > room and batch.steps:
                break
            self._take(batch, step, room, queue.decode)
        left = min(self.max_batch_tokens - batch.tokens, max(self.prefill_rows, 1))
        for step in self._in_turn(queue.prefill):
            if not left:
                break
            left -= self._take(batch, step, left, queue.prefill)

    def _take(self, batch: ScheduledBatch[StepT], step: StepT, room: int, steps: dict[StepT, None]) -> int:
        chunk = step.take(room)
        if not step.left or not self._is_short(step):
            del steps[step]
            if step.left:
                steps[step] = None
        batch.steps.append(step)
        batch.chunks.append(chunk)
        batch.tokens += chunk.tokens
        self._given[step.caller] = self._given.get(step.caller, 0) + chunk.tokens
        return chunk.tokens

    def _is_short(self, step: StepT) -> bool:
        return step.left <= SHORT * self.max_batch_tokens

    def _in_turn(self, steps: Iterable[StepT]) -> Iterator[StepT]:
        """Short ones that have begun, then at each turn the oldest of the caller that was given least."""
        queues: dict[str, deque[StepT]] = {}
        begun = []
        for step in steps:
            if step.taken and not step.decode and self._is_short(step):
                begun.append(step)
            else:
                queues.setdefault(step.caller, deque()).append(step)
        yield from begun
        while queues:
            caller = min(queues, key=lambda caller: self._given.get(caller, 0))
            yield queues[caller].popleft()
            if not queues[caller]:
                del queues[caller]

    def _drop_empty(self, span: Span, queue: _SpanQueue[StepT]) -> None:
        if not queue.decode and not queue.prefill:
            self._queues.pop(span, None)

    def __repr__(self) -> str:
        queues = self._queues.values()
        decode, prefill = sum(len(x.decode) for x in queues), sum(len(x.prefill) for x in queues)
        rows = sum(step.left for queue in queues for step in queue.prefill)
        return f"<Scheduler {decode} decode · {prefill} prefill ({rows} tokens)>"


def _all(queue: _SpanQueue[StepT]) -> Iterator[StepT]:
    yield from queue.decode
    yield from queue.prefill


class PrefillBudget:
    """How many rows of prefill go into a batch, so that no batch takes long; follows how long batches take.

    Others' decode steps wait for the batch that runs, and only the end of a batch shows that a slow server
    makes progress. What a batch takes for a few rows it takes for many: the weights are read once. So it is
    not rows that are reckoned with but whole batches, and the number is only ever halved or doubled.
    """

    def __init__(self, first: int = FIRST) -> None:
        self._rows = first
        self._decoded_at = float("-inf")

    @property
    def rows(self) -> int:
        """Most rows of prefill in the next batch, 1 or more."""
        return self._rows

    def note_batch(
        self, rows: int, seconds: float, *, decodes: bool, decode_seconds: float, now: float
    ) -> None:
        """A batch with so many rows of prefill is through; whether it had decode steps as well.

        ``decode_seconds`` is what a batch of decode steps alone takes; 0 when that is not known.
        """
        if decodes:
            self._decoded_at = now
        if not rows:
            return
        target = LONGEST
        if now < self._decoded_at + ACTIVE:
            target = min(max(SHORTEST, DECODES * decode_seconds), LONGEST)
        if seconds > target:
            least = LEAST if seconds <= LONGEST else 1
            self._rows = max(min(self._rows, rows) // 2, min(least, self._rows))
        elif rows >= self._rows and seconds < target / 2:
            self._rows = min(2 * self._rows, MOST)

    def __repr__(self) -> str:
        return f"<PrefillBudget {self._rows} rows>"

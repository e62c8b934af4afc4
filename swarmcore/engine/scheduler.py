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

StepT = TypeVar("StepT", bound=PendingStep)


@attrs.define(eq=False)
class Batch(Generic[StepT]):
    """What to run in one pass: ``slices[i]`` is the next part of ``steps[i]``."""

    steps: list[StepT] = attrs.field(factory=list)
    slices: list[ScheduledChunk] = attrs.field(factory=list)
    tokens: int = 0
    expired: list[StepT] = attrs.field(factory=list)
    """Steps dropped because their deadline has passed; they will not run any further."""

    @property
    def decode_only(self) -> bool:
        return all(step.decode for step in self.steps)


@attrs.define(eq=False)
class _Line(Generic[StepT]):
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
    that was passed over eight times comes before all others. A batch holds at most one slice of a step. Steps
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
        self._lines: dict[Span, _Line[StepT]] = {}
        self._given: dict[str, int] = {}  # rows, of callers with steps in line

    def __len__(self) -> int:
        return sum(len(line.decode) + len(line.prefill) for line in self._lines.values())

    @property
    def decode_waiting(self) -> int:
        """How many decode steps wait; 0 when any prefill does."""
        if any(line.prefill for line in self._lines.values()):
            return 0
        return sum(len(line.decode) for line in self._lines.values())

    def add(self, step: StepT) -> None:
        """The step may run from now on."""
        line = self._lines.get(step.span)
        if line is None:
            line = self._lines[step.span] = _Line()
        line.of(step)[step] = None
        if step.caller not in self._given:  # it starts level with those that are there
            self._given[step.caller] = min(self._given.values(), default=0)

    def remove(self, step: StepT) -> None:
        """Forget the step; harmless when it is not there."""
        if (line := self._lines.get(step.span)) is not None:
            line.of(step).pop(step, None)
            self._drop_empty(step.span, line)

    def schedule(self, now: float) -> Batch[StepT]:
        """The next batch. The results of the batch before it must have been put into their steps.

        A step leaves the scheduler with its last slice. The batch is empty only when nothing is left to run.
        """
        batch: Batch[StepT] = Batch()
        batch.expired = [s for line in self._lines.values() for s in _all(line) if s.deadline <= now]
        for step in batch.expired:
            self.remove(step)
        if not self._lines:
            return batch
        for line in self._lines.values():
            line.passed_over += 1
        span, line = max(self._lines.items(), key=lambda item: item[1].urgency())
        line.passed_over = 0
        self._fill(batch, line)
        self._drop_empty(span, line)
        callers = {step.caller for line in self._lines.values() for step in _all(line)}
        self._given = {caller: rows for caller, rows in self._given.items() if caller in callers}
        return batch

    def _fill(self, batch: Batch[StepT], line: _Line[StepT]) -> None:
        kept = max(self.max_batch_tokens // PREFILL_SHARE, 1) if line.prefill else 0
        for step in self._in_turn(line.decode):
            room = self.max_batch_tokens - kept - batch.tokens
            # A decode step runs in one piece unless it is wider than a batch; cutting it would only delay it.
            if step.left > room and batch.steps:
                break
            self._take(batch, step, room, line.decode)
        left = min(self.max_batch_tokens - batch.tokens, max(self.prefill_rows, 1))
        for step in self._in_turn(line.prefill):
            if not left:
                break
            left -= self._take(batch, step, left, line.prefill)

    def _take(self, batch: Batch[StepT], step: StepT, room: int, steps: dict[StepT, None]) -> int:
        part = step.take(room)
        if not step.left or not self._is_short(step):
            del steps[step]
            if step.left:
                steps[step] = None
        batch.steps.append(step)
        batch.slices.append(part)
        batch.tokens += part.tokens
        self._given[step.caller] = self._given.get(step.caller, 0) + part.tokens
        return part.tokens

    def _is_short(self, step: StepT) -> bool:
        return step.left <= SHORT * self.max_batch_tokens

    def _in_turn(self, steps: Iterable[StepT]) -> Iterator[StepT]:
        """Short ones that have begun, then at each turn the oldest of the caller that was given least."""
        lines: dict[str, deque[StepT]] = {}
        begun = []
        for step in steps:
            if step.taken and not step.decode and self._is_short(step):
                begun.append(step)
            else:
                lines.setdefault(step.caller, deque()).append(step)
        yield from begun
        while lines:
            caller = next(iter(lines)) if len(lines) == 1 else min(lines, key=lambda c: self._given.get(c, 0))
            yield lines[caller].popleft()
            if not lines[caller]:
                del lines[caller]

    def _drop_empty(self, span: Span, line: _Line[StepT]) -> None:
        if not line.decode and not line.prefill:
            self._lines.pop(span, None)

    def __repr__(self) -> str:
        lines = self._lines.values()
        decode, prefill = sum(len(x.decode) for x in lines), sum(len(x.prefill) for x in lines)
        rows = sum(step.left for line in lines for step in line.prefill)
        return f"<Scheduler {decode} decode · {prefill} prefill ({rows} tokens)>"


def _all(line: _Line[StepT]) -> Iterator[StepT]:
    yield from line.decode
    yield from line.prefill

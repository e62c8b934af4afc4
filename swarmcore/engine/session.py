"""One session on one server: its sequences, how long each is, and the steps that wait in its queue."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import attrs

from swarmcore.engine.kv_allocation import AdmissionRequest, KVAllocation
from swarmcore.engine.prefix_cache import SequencePrefix
from swarmcore.engine.step import PendingStep
from swarmcore.errors import (
    DeadlineExceededError,
    InvalidStepError,
    SessionLostError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.executor.base import Adapter, Segment, SequenceId
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

AnswerT = TypeVar("AnswerT")


@attrs.define(eq=False, kw_only=True)
class SessionStep(PendingStep):
    """A step in the queue of its session, and the future that its caller waits on."""

    session: EngineSession
    answer: asyncio.Future[Tensor]
    submitted: float
    timeout: float
    """Seconds after which it fails while the engine gets nothing done; see `deadline`."""
    done: bool = False
    """Whether it was answered, failed or cancelled; its last chunk may still be computing then."""
    source: ClassVar[None] = None
    reordered: bool = False
    """Whether the session's caches follow ``sources``, or are just being made to."""

    @property
    def caller(self) -> str:
        return self.session.allocation.caller


@attrs.define(eq=False, kw_only=True)
class KVImport:
    """A piece of attention cache that comes from elsewhere, in the queue of its session like a step.

    From another server, as ``tensors``; or from another sequence here, that of ``source``.
    """

    session: EngineSession
    segments: tuple[Segment]
    timeout: float
    deadline: float
    tensors: Sequence[Tensor] = ()
    source: SequencePrefix | None = None
    answer: asyncio.Future[None]
    begin: Callable[[KVImport], None]
    """Called when it is first in the queue and there is room for it in the cache."""
    sources: ClassVar[tuple[int, ...]] = ()
    reordered: ClassVar[bool] = False
    done: bool = False
    begun: bool = False
    """Whether the executor was asked to import it."""

    @property
    def caller(self) -> str:
        return self.session.allocation.caller

    @property
    def rows(self) -> int:
        return self.segments[0].count

    def started(self) -> tuple[Segment, ...]:
        return self.segments if self.begun else ()


QueueItem = SessionStep | KVImport
"""What stands in a session's queue: it needs room in the cache, and then the executor."""


@attrs.frozen
class PendingSession:
    """A session that waits to be admitted."""

    span: Span
    adapter: Adapter | None
    request: AdmissionRequest
    answer: asyncio.Future[None]


class PendingTokens:
    """Tokens of the steps in the queues of all sessions, and how many there may be."""

    def __init__(self, *, max_steps: int, max_tokens: int) -> None:
        """``max_steps`` of one session, ``max_tokens`` of all; half of these of one caller."""
        self.max_steps = max_steps
        self.max_tokens = max_tokens
        self.tokens = 0
        self._by_caller: Counter[str] = Counter()

    def check(self, session: EngineSession, rows: int) -> None:
        """Raise `TooManyCallsError` unless ``rows`` more may wait in the session's queue."""
        if len(session.queue) >= self.max_steps:
            raise TooManyCallsError(
                f"{len(session.queue)} steps of the session wait already; await some before sending more"
            )
        caller = session.allocation.caller
        own = self._by_caller[caller]
        if caller and own and own + rows > self.max_tokens // 2:
            raise TooManyCallsError(
                f"{own} tokens of yours wait to be computed, and one client may have "
                f"{self.max_tokens // 2}; await some before sending more"
            )
        if self.tokens + rows > self.max_tokens:
            raise TooManyCallsError(
                f"{self.tokens} tokens wait to be computed; try again later, or another server"
            )

    def add(self, caller: str, rows: int) -> None:
        self.tokens += rows
        self._by_caller[caller] += rows

    def remove(self, caller: str, rows: int) -> None:
        self.tokens -= rows
        self._by_caller[caller] -= rows
        if not self._by_caller[caller]:
            del self._by_caller[caller]


class EngineSession:
    """Only the first item in its queue has room in the cache, or waits for it, or computes."""

    def __init__(
        self, name: str, pending: PendingSession, sequences: tuple[SequenceId, ...], allocation: KVAllocation
    ) -> None:
        self.name = name
        self.span = pending.span
        self.adapter = pending.adapter
        self.sequences = sequences
        self.allocation = allocation
        self.lengths = [0] * len(sequences)
        """Cached tokens of each sequence, of steps that are done."""
        self.scheduled = list(self.lengths)
        """The same once every step in the queue is done."""
        self.queue: deque[QueueItem] = deque()
        self.active: QueueItem | None = None
        """What was last given to the scheduler, until it is done."""
        self.computing = False
        """Whether the executor works on its caches: ``active`` is in the batch that runs now, or caches are
        imported or exported."""
        self.closed = False
        self.computed = 0
        """Rows computed or imported so far, those of unfinished steps included; not those of prefixes."""
        self.reserved = allocation.room
        """Tokens, for each sequence, for which room was reserved in the executor."""
        self.prefixes: list[SequencePrefix] = []
        """One for each sequence, where their client has named what they begin with."""

    def segments(
        self, starts: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> tuple[Segment, ...]:
        """What a step adds to which sequences. Raise `InvalidStepError` unless it can follow the queue."""
        count = len(self.sequences)
        if sources and len(sources) != count:
            raise InvalidStepError(
                f"the step has {len(sources)} sources; expected {count}, one for every sequence of the "
                f"session, or none"
            )
        if wrong := [source for source in sources if not 0 <= source < count]:
            raise InvalidStepError(
                f"sequence {wrong[0]} cannot be copied: the session has sequences 0 to {count - 1}"
            )
        before = [self.scheduled[source] for source in sources] if sources else self.scheduled
        if len(starts) != count or len(lengths) != count:
            raise InvalidStepError(
                f"the step has {len(starts)} starts and {len(lengths)} lengths; expected {count} of each, "
                f"one for every sequence of the session"
            )
        segments = []
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if start < 0 or length < 0:
                raise InvalidStepError(
                    f"sequence {index} has start {start} and length {length}; expected 0 or more"
                )
            if length and start > before[index]:
                raise InvalidStepError(
                    f"sequence {index} starts at position {start}, ahead of its {before[index]} "
                    f"cached tokens; expected {before[index]}, or less to roll back"
                )
            if length:
                segments.append(Segment(self.sequences[index], start, length))
        return tuple(segments)

    def segment(self, sequence: int, start: int, count: int) -> Segment:
        """What an import adds to one sequence. Raise `InvalidStepError` unless it can follow the queue."""
        many = len(self.sequences)
        if not 0 <= sequence < many or count < 1:
            raise InvalidStepError(
                f"a cache of {count} tokens for sequence {sequence}; expected 1 or more for "
                f"one of 0 to {many - 1}"
            )
        starts, lengths = [0] * many, [0] * many
        starts[sequence], lengths[sequence] = start, count
        [segment] = self.segments(starts, lengths)
        return segment

    def extend_deadlines(self, now: float) -> None:
        """The time of its steps begins anew, but of those that wait for room in the cache."""
        if self.allocation.growth is None:
            for item in self.queue:
                item.deadline = max(item.deadline, now + item.timeout)

    def append(self, item: QueueItem) -> None:
        self.queue.append(item)
        self._apply(item, self.scheduled)

    def target(self, item: QueueItem) -> list[int]:
        """The lengths once the first item in the queue is done."""
        lengths = list(self.lengths)
        self._apply(item, lengths)
        return lengths

    def reorder(self, step: SessionStep) -> None:
        """The first step in the queue has its caches reordered from now on."""
        self.lengths = [self.lengths[source] for source in step.sources]
        step.reordered = True

    def complete(self, item: QueueItem) -> None:
        """The first item in the queue has been computed."""
        self.queue.popleft()
        self.active = None
        self._apply(item, self.lengths)

    def discard(self, item: QueueItem) -> list[QueueItem]:
        """The item will not be computed; return those behind it that cannot run without it.

        What it had run already is lost: where it rolled a sequence back, the tokens from its start on are
        gone.
        """
        first = self.sequences[0]
        for segment in item.started():
            index = segment.sequence - first
            self.lengths[index] = min(self.lengths[index], segment.start)
        if self.active is item:
            self.active = None
        self.queue.remove(item)
        reachable = list(self.lengths)
        orphans: list[QueueItem] = []
        for later in self.queue:
            # A reordering was chosen for the caches as all earlier steps would have left them.
            reorders = item.sources or later.sources or any(orphan.sources for orphan in orphans)
            if reorders or any(seg.start > reachable[seg.sequence - first] for seg in later.segments):
                orphans.append(later)
            else:
                self._apply(later, reachable)
        self.scheduled = reachable
        return orphans

    def _apply(self, item: QueueItem, lengths: list[int]) -> None:
        if item.sources and not item.reordered:
            lengths[:] = [lengths[source] for source in item.sources]
        first = self.sequences[0]
        for segment in item.segments:
            lengths[segment.sequence - first] = segment.start + segment.count

    def __repr__(self) -> str:
        doing = "computing" if self.computing else "waiting for room" if self.allocation.growth else "idle"
        if self.queue and doing == "idle":
            doing = "queued"
        return (
            f"<EngineSession {self.name[:8]} · pos {max(self.lengths)} · {len(self.queue)} steps · {doing}>"
        )


def orphan_error(error: SwarmError) -> SwarmError:
    """What a step fails with when one that it builds on failed with ``error``."""
    message = f"an earlier step of the session, which this one builds on, failed: {error.message}"
    return type(error)(message, **error.details)


def deadline_error(item: QueueItem) -> DeadlineExceededError:
    """What an item fails with when its deadline has passed."""
    if isinstance(item, KVImport):
        return DeadlineExceededError(f"attention cache of {item.rows} tokens did not get in by its deadline")
    return DeadlineExceededError(
        f"the step of {item.rows} tokens was not computed by its deadline ({item.taken} tokens were)"
    )


def reordered_error(session: EngineSession, error: SwarmError) -> SessionLostError:
    """What a session ends with when a step failed with ``error`` after its caches had been reordered."""
    return SessionLostError(
        f"session {session.name[:8]} was ended: a step failed after its caches had been reordered "
        f"({error.message}); open a new one and replay"
    )


def resolve(answer: asyncio.Future[AnswerT], result: AnswerT) -> None:
    """Answer with ``result``, unless whoever waits was cancelled."""
    if not answer.done():
        answer.set_result(result)


def reject(answer: asyncio.Future[Any], error: SwarmError) -> None:
    """Answer with ``error``, unless there is an answer, or whoever waits was cancelled."""
    if not answer.done():
        answer.set_exception(error)

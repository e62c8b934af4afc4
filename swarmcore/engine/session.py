"""One session on one server: its sequences, how long each is, and the steps that wait in its line."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs

from swarmcore.engine.cache_requests import Admission, Holding
from swarmcore.engine.step import PendingStep
from swarmcore.errors import DeadlineExceededError, InvalidStepError, SessionLostError, SwarmError
from swarmcore.executor.base import Adapter, Segment, SequenceId
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


@attrs.define(eq=False, kw_only=True)
class SessionStep(PendingStep):
    """A step in the line of its session, and the future that its caller waits on."""

    session: EngineSession
    answer: asyncio.Future[Tensor]
    submitted: float
    timeout: float
    """Seconds after which it fails while the engine gets nothing done; see `deadline`."""
    done: bool = False
    """Whether it was answered, failed or cancelled; its last slice may still be computing then."""
    reordered: bool = False
    """Whether the session's caches follow ``sources``, or are just being made to."""

    @property
    def caller(self) -> str:
        return self.session.holding.caller


@attrs.define(eq=False, kw_only=True)
class KVImport:
    """A piece of attention cache that comes from elsewhere, in the line of its session like a step."""

    session: EngineSession
    segments: tuple[Segment]
    timeout: float
    deadline: float
    tensors: Sequence[Tensor]
    answer: asyncio.Future[None]
    begin: Callable[[KVImport], None]
    """Called when it is first in line and there is room for it in the cache."""
    sources: ClassVar[tuple[int, ...]] = ()
    reordered: ClassVar[bool] = False
    done: bool = False
    begun: bool = False
    """Whether the executor has been told to take it in."""

    @property
    def rows(self) -> int:
        return self.segments[0].count

    def started(self) -> tuple[Segment, ...]:
        return self.segments if self.begun else ()


Turn = SessionStep | KVImport
"""What stands in a session's line: it needs room in the cache, and then the executor."""


@attrs.frozen
class Share:
    """What a session that passes through ``blocks`` blocks pays, where a page of the budget is one through
    ``unit`` of them."""

    blocks: int
    unit: int

    def charge(self, pages: int) -> int:
        """What so many pages of the session's own take in the budget, rounded up."""
        return -(-pages * self.blocks // self.unit)

    def pages(self, charged: int) -> int:
        """How many pages of the session's own have room in ``charged`` ones of the budget."""
        return charged * self.unit // self.blocks


@attrs.frozen
class Opening:
    """A session that waits to be admitted."""

    span: Span
    share: Share
    adapter: Adapter | None
    request: Admission
    answer: asyncio.Future[None]


class EngineSession:
    """The first turn in line is the only one that has room in the cache, or waits for it, or computes."""

    def __init__(
        self, name: str, opening: Opening, sequences: tuple[SequenceId, ...], holding: Holding
    ) -> None:
        self.name = name
        self.span = opening.span
        self.share = opening.share
        self.adapter = opening.adapter
        self.sequences = sequences
        self.holding = holding
        self.lengths = [0] * len(sequences)
        """Cached tokens of each sequence, of steps that are done."""
        self.scheduled = list(self.lengths)
        """The same once every step in line is done."""
        self.line: deque[Turn] = deque()
        self.active: Turn | None = None
        """What was last given to the scheduler, until it is done."""
        self.computing = False
        """Whether the executor works on its caches: ``active`` is in the batch that runs now, or caches are
        imported or exported."""
        self.closed = False
        self.computed = 0
        """Rows computed or imported so far, those of unfinished steps included."""
        self.reserved = list(holding.pages)
        """Pages of the budget, for each sequence, that the executor was told of."""

    @property
    def prefix_tokens(self) -> int:
        """Cached positions before the first token of each sequence."""
        return self.adapter.prefix_tokens if self.adapter is not None else 0

    def segments(
        self, starts: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> tuple[Segment, ...]:
        """What a step adds to which sequences. Raise `InvalidStepError` unless it can follow the line."""
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

    def append(self, turn: Turn) -> None:
        self.line.append(turn)
        self._apply(turn, self.scheduled)

    def target(self, turn: Turn) -> list[int]:
        """The lengths once the first turn in line is done."""
        lengths = list(self.lengths)
        self._apply(turn, lengths)
        return lengths

    def reorder(self, step: SessionStep) -> None:
        """The first step in line has its caches reordered from now on."""
        self.lengths = [self.lengths[source] for source in step.sources]
        step.reordered = True

    def complete(self, turn: Turn) -> None:
        """The first turn in line has been computed."""
        self.line.popleft()
        self.active = None
        self._apply(turn, self.lengths)

    def discard(self, turn: Turn) -> list[Turn]:
        """The turn will not be computed; return those in line behind it that cannot run without it.

        What it had run already is lost: where it rolled a sequence back, the tokens from its start on are
        gone.
        """
        first = self.sequences[0]
        for segment in turn.started():
            index = segment.sequence - first
            self.lengths[index] = min(self.lengths[index], segment.start)
        if self.active is turn:
            self.active = None
        self.line.remove(turn)
        reachable = list(self.lengths)
        orphans: list[Turn] = []
        for later in self.line:
            # Which cache goes where was chosen in view of all that came before.
            reorders = turn.sources or later.sources or any(orphan.sources for orphan in orphans)
            if reorders or any(seg.start > reachable[seg.sequence - first] for seg in later.segments):
                orphans.append(later)
            else:
                self._apply(later, reachable)
        self.scheduled = reachable
        return orphans

    def _apply(self, turn: Turn, lengths: list[int]) -> None:
        if turn.sources and not turn.reordered:
            lengths[:] = [lengths[source] for source in turn.sources]
        first = self.sequences[0]
        for segment in turn.segments:
            lengths[segment.sequence - first] = segment.start + segment.count

    def __repr__(self) -> str:
        doing = "computing" if self.computing else "waiting for room" if self.holding.growth else "idle"
        if self.line and doing == "idle":
            doing = "queued"
        return f"<EngineSession {self.name[:8]} · pos {max(self.lengths)} · {len(self.line)} steps · {doing}>"


def orphaned(error: SwarmError) -> SwarmError:
    """What a step fails with when one that it builds on failed with ``error``."""
    message = f"an earlier step of the session, which this one builds on, failed: {error.message}"
    return type(error)(message, **error.details)


def expired(turn: Turn) -> DeadlineExceededError:
    """What a turn fails with when its deadline has passed."""
    if isinstance(turn, KVImport):
        return DeadlineExceededError(f"attention cache of {turn.rows} tokens did not get in by its deadline")
    return DeadlineExceededError(
        f"the step of {turn.rows} tokens was not computed by its deadline ({turn.taken} tokens were)"
    )


def confused(session: EngineSession, error: SwarmError) -> SessionLostError:
    """What a session ends with when a step failed with ``error`` after its caches had been reordered."""
    return SessionLostError(
        f"session {session.name[:8]} was ended: a step failed after its caches had been reordered "
        f"({error.message}); open a new one and replay"
    )

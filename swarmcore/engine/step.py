"""One step while it is computed: cut into chunks, run in one or several batches, put together again."""

from __future__ import annotations

from typing import Literal

import attrs

from swarmcore.errors import InternalError
from swarmcore.executor.base import Adapter, ScheduledChunk, Segment
from swarmcore.types import Span
from swarmcore.wire.limits import MAX_DRAFTED
from swarmcore.wire.tensors import Tensor, joined


@attrs.define(eq=False)
class PendingStep:
    """A step that still has rows to run. Rows are taken in order, a chunk at a time."""

    span: Span
    segments: tuple[Segment, ...]
    """All of the step, in the order of its rows; no segment is empty."""
    hidden: Tensor
    reply: Literal["all", "last"]
    codec: str
    deadline: float
    sources: tuple[int, ...] = ()
    """Which sequence of its session each one is made a copy of before the first row is run; empty: none."""
    adapter: Adapter | None = None
    rows: int = attrs.field(init=False)
    decode: bool = attrs.field(init=False)
    """Whether the step adds a token to each of its sequences, or a few that were drafted."""
    taken: int = attrs.field(init=False, default=0)
    """Rows handed out so far."""
    _running: ScheduledChunk | None = attrs.field(init=False, default=None)
    _segment: int = attrs.field(init=False, default=0)
    _offset: int = attrs.field(init=False, default=0)
    _parts: list[Tensor] = attrs.field(init=False, factory=list)

    @property
    def caller(self) -> str:
        """Whose step it is: callers share batches evenly."""
        return ""

    def __attrs_post_init__(self) -> None:
        self.rows = sum(segment.count for segment in self.segments)
        self.decode = all(
            segment.count == 1 or (segment.start and segment.count <= MAX_DRAFTED)
            for segment in self.segments
        )

    @property
    def left(self) -> int:
        """Rows not handed out yet."""
        return self.rows - self.taken

    @property
    def finished(self) -> bool:
        """Whether every row has been computed."""
        return self.taken == self.rows and self._running is None

    @property
    def whole(self) -> bool:
        """Whether the step is, or was, run as a single chunk."""
        return len(self._parts) + (self._running is not None) <= 1 and self.taken == self.rows

    def take(self, rows: int) -> ScheduledChunk:
        """The next chunk, of at most ``rows`` rows."""
        if self.taken == 0 and rows >= self.rows:
            self.taken, self._segment = self.rows, len(self.segments)
            self._running = self._chunk(0, self.segments, self.codec)
            return self._running
        first, segments = self.taken, []
        while rows and self._segment < len(self.segments):
            segment = self.segments[self._segment]
            count = min(rows, segment.count - self._offset)
            segments.append(Segment(segment.sequence, segment.start + self._offset, count))
            rows -= count
            self.taken += count
            self._offset += count
            if self._offset == segment.count:
                self._segment, self._offset = self._segment + 1, 0
        # Encoded rows cannot be joined, so the parts of a step come raw and the whole is encoded at the end.
        self._running = self._chunk(first, tuple(segments), "raw")
        return self._running

    def _chunk(self, first: int, segments: tuple[Segment, ...], codec: str) -> ScheduledChunk:
        return ScheduledChunk(self.hidden, first, self.span, segments, self.reply, codec, self.adapter)

    def put(self, result: Tensor) -> None:
        """The result of the chunk taken last. Raise `InternalError` when it has not the rows asked for."""
        part, self._running = self._running, None
        if part is None:
            raise InternalError("a result came for a step of which no chunk was running")
        expected = part.tokens if self.reply == "all" else len(part.segments)
        if len(result.shape) != 2 or result.shape[0] != expected:
            raise InternalError(
                f"the executor answered {expected} rows with a tensor of shape {result.shape}"
            )
        # Only the last segment of a chunk can be cut short; its "last" row is not the step's then.
        if self.reply == "last" and self._offset:
            result = _first_rows(result, expected - 1)
        self._parts.append(result)

    def result(self) -> Tensor:
        """The step's result, encoded with ``codec`` when `whole`, else raw."""
        return joined(self._parts)

    def started(self) -> tuple[Segment, ...]:
        """The segments of which rows were handed out: their caches are no longer what they were."""
        return self.segments[: self._segment + (self._offset > 0)]


def _first_rows(tensor: Tensor, rows: int) -> Tensor:
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    return attrs.evolve(tensor, shape=(rows, tensor.shape[1]), data=tensor.data[: rows * row_bytes])

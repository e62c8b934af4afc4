"""One session on one server: its sequences, how long each is, and the steps that wait in its line."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import attrs

from swarmcore.errors import InvalidStepError, SwarmError, UnknownCodecError
from swarmcore.executor.base import Segment, SequenceId
from swarmcore.executor.cache import Holding
from swarmcore.executor.steps import PendingStep
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor, codec_names

HIDDEN_DTYPES = ("float32", "float16", "bfloat16")


@attrs.define(eq=False, kw_only=True)
class SessionStep(PendingStep):
    """A step in the line of its session, and the future that its caller waits on."""

    session: EngineSession
    answer: asyncio.Future[Tensor]
    done: bool = False
    """Whether it was answered, failed or cancelled; its last slice may still be computing then."""


class EngineSession:
    """The first step in line is the only one that has room in the cache, or waits for it, or computes."""

    def __init__(self, name: str, span: Span, sequences: tuple[SequenceId, ...], holding: Holding) -> None:
        self.name = name
        self.span = span
        self.sequences = sequences
        self.holding = holding
        self.lengths = [0] * len(sequences)
        """Cached tokens of each sequence, of steps that are done."""
        self.scheduled = list(self.lengths)
        """The same once every step in line is done."""
        self.line: deque[SessionStep] = deque()
        self.active: SessionStep | None = None
        """The step that was last given to the scheduler, until it is done."""
        self.computing = False
        """Whether a slice of ``active`` is in the batch that runs now."""
        self.closed = False
        self.reserved = list(holding.pages)
        """Pages of each sequence that the executor was told of."""

    def segments(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Segment, ...]:
        """What a step adds to which sequences. Raise `InvalidStepError` unless it can follow the line."""
        count = len(self.sequences)
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
            if length and start > self.scheduled[index]:
                raise InvalidStepError(
                    f"sequence {index} starts at position {start}, ahead of its {self.scheduled[index]} "
                    f"cached tokens; expected {self.scheduled[index]}, or less to roll back"
                )
            if length:
                segments.append(Segment(self.sequences[index], start, length))
        return tuple(segments)

    def append(self, step: SessionStep) -> None:
        self.line.append(step)
        self._apply(step, self.scheduled)

    def target(self, step: SessionStep) -> list[int]:
        """The lengths once the first step in line is done."""
        lengths = list(self.lengths)
        self._apply(step, lengths)
        return lengths

    def complete(self, step: SessionStep) -> None:
        """The first step in line has been computed."""
        self.line.popleft()
        self.active = None
        self._apply(step, self.lengths)

    def discard(self, step: SessionStep) -> list[SessionStep]:
        """The step will not be computed; return those in line behind it that cannot run without it.

        What it had run already is lost: where it rolled a sequence back, the tokens from its start on are
        gone.
        """
        first = self.sequences[0]
        for segment in step.started():
            index = segment.sequence - first
            self.lengths[index] = min(self.lengths[index], segment.start)
        if self.active is step:
            self.active = None
        self.line.remove(step)
        reachable = list(self.lengths)
        orphans = []
        for later in self.line:
            if all(segment.start <= reachable[segment.sequence - first] for segment in later.segments):
                self._apply(later, reachable)
            else:
                orphans.append(later)
        self.scheduled = reachable
        return orphans

    def _apply(self, step: SessionStep, lengths: list[int]) -> None:
        first = self.sequences[0]
        for segment in step.segments:
            lengths[segment.sequence - first] = segment.start + segment.count

    def __repr__(self) -> str:
        doing = "computing" if self.computing else "waiting for room" if self.holding.growth else "idle"
        if self.line and doing == "idle":
            doing = "queued"
        return f"<EngineSession {self.name[:8]} · pos {max(self.lengths)} · {len(self.line)} steps · {doing}>"


def check_hidden(hidden: Tensor, rows: int, width: int, max_rows: int) -> None:
    """Raise `InvalidStepError` unless ``hidden`` is ``[rows, width]`` in a dtype that executors take."""
    if not 0 < rows <= max_rows:
        raise InvalidStepError(
            f"the step has {rows} tokens; expected 1 to {max_rows}: send a longer one in several steps"
        )
    if hidden.shape != (rows, width):
        raise InvalidStepError(
            f"hidden states have shape {list(hidden.shape)}; expected [{rows}, {width}]: a row for each "
            f"token of the step's lengths, of the model's hidden size"
        )
    if hidden.dtype not in HIDDEN_DTYPES:
        raise InvalidStepError(
            f"hidden states are of dtype {hidden.dtype!r}; expected {', '.join(HIDDEN_DTYPES)}"
        )
    if hidden.codec == "raw" and hidden.data.nbytes != hidden.decoded_nbytes:
        raise InvalidStepError(
            f"hidden states hold {hidden.data.nbytes} bytes; expected {hidden.decoded_nbytes} for {rows} "
            f"rows of {width} {hidden.dtype} values"
        )
    check_codec(hidden.codec)


def check_codec(codec: str) -> None:
    """Raise `UnknownCodecError` unless tensors can be encoded with ``codec`` here."""
    base, plus, on_top = codec.partition("+")
    if base not in codec_names() or (plus and on_top != "zstd"):
        known = ", ".join(codec_names())
        raise UnknownCodecError(
            f"tensor codec {codec!r} is not known here; expected one of {known}, alone or with +zstd on top"
        )


def orphaned(error: SwarmError) -> SwarmError:
    """What a step fails with when one that it builds on failed with ``error``."""
    message = f"an earlier step of the session, which this one builds on, failed: {error.message}"
    return type(error)(message, **error.details)

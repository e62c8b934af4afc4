"""Steps: chunks of many sessions run as ragged batches, each with its own result or error."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from swarmcore.errors import InternalError, InvalidStepError, SwarmError
from swarmcore.executor.base import ScheduledChunk, Segment
from swarmcore.executor.ggml.arrays import LARGEST, to_rows, to_tensor
from swarmcore.executor.ggml.graph_tap import Rows
from swarmcore.executor.ggml.kv_state import read_state
from swarmcore.executor.ggml.sequences import CachedSequence, Sequences
from swarmcore.executor.ggml.span_model import NoCellsError, SpanModel
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


@attrs.define(eq=False)
class _Accepted:
    """A chunk that is part of the batch: its place among the results, its rows, and what comes of them."""

    index: int
    chunk: ScheduledChunk
    rows: Rows
    entries: list[CachedSequence]
    """Of its segments."""
    outputs: list[Rows] = attrs.field(factory=list)

    @property
    def finite(self) -> bool:
        return all(bool(np.isfinite(rows).all()) for rows in self.outputs)


class StepRunner:
    """Runs in the compute thread; what it remembers from step to step is decoded tensors."""

    def __init__(
        self,
        width: int,
        dtype: str,
        batch_tokens: int,
        sequences: Sequences,
        max_positions: int | None = None,
    ) -> None:
        self._width, self._dtype, self._max_positions = width, dtype, max_positions
        self._batch_tokens, self._sequences = batch_tokens, sequences
        self._decoded: tuple[weakref.ref[Tensor], Rows] | None = None
        """The last step that is run in several chunks."""

    def run(self, model: SpanModel, held: Span, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`; ``held`` are the blocks of ``model``."""
        results: list[Tensor | SwarmError | None] = [None] * len(batch)
        accepted: list[_Accepted] = []
        lengths: dict[int, int] = {}
        for index, chunk in enumerate(batch):
            try:
                accepted.append(self._accept(index, chunk, held, lengths))
            except SwarmError as exc:
                results[index] = exc
        if accepted:
            try:
                self._compute(model, held, accepted)
            except Exception:
                for each in accepted:
                    self._undo(model, each)
                raise
            if all(each.finite for each in accepted):
                for each in accepted:
                    results[each.index] = self._result(each)
            else:
                for each in accepted:
                    self._undo(model, each)
                self._repair(model)
                for each in accepted:
                    results[each.index] = self._alone(model, held, each)
        return [result or InternalError("a chunk was not computed") for result in results]

    def _accept(self, index: int, chunk: ScheduledChunk, held: Span, lengths: dict[int, int]) -> _Accepted:
        """``lengths`` are as the batch so far will leave them. Raise what is wrong with the chunk."""
        if not held.covers(chunk.span):
            raise InternalError(f"blocks {chunk.span} are not loaded; this executor holds {held}")
        rows = self._rows(chunk)
        if not np.isfinite(rows).all():
            raise InvalidStepError("hidden states contain values that are not finite in float32")
        entries, after = [], dict(lengths)
        for segment in chunk.segments:
            entry = self._sequences.entry(segment.sequence)
            self._sequences.begin(entry, chunk.span)
            length = after.get(segment.sequence, entry.length)
            if segment.count < 1 or not 0 <= segment.start <= length:
                raise InvalidStepError(
                    f"a step of {segment.count} tokens at position {segment.start} does not continue a "
                    f"sequence of {length} tokens"
                )
            after[segment.sequence] = end = segment.start + segment.count
            if self._max_positions is not None and end > self._max_positions:
                raise InvalidStepError(
                    f"a sequence of {end} tokens is too long: what the model has for positions ends, or "
                    f"changes, at {self._max_positions} tokens"
                )
            entries.append(entry)
        lengths.update(after)
        return _Accepted(index, chunk, rows, entries)

    def _rows(self, chunk: ScheduledChunk) -> Rows:
        """The chunk's rows, ``[tokens, hidden size]``."""
        hidden = self._decode(chunk)
        last = chunk.first_row + chunk.tokens
        if hidden.ndim != 2 or hidden.shape[1] != self._width or len(hidden) < last:
            raise InvalidStepError(
                f"hidden states have shape {list(hidden.shape)}; expected [tokens, {self._width}] with at "
                f"least {last} tokens"
            )
        return hidden[chunk.first_row : last]

    def _decode(self, chunk: ScheduledChunk) -> Rows:
        """The whole step's hidden states, decoded once however many chunks it is run in."""
        tensor = chunk.hidden
        if self._decoded is not None and self._decoded[0]() is tensor:
            return self._decoded[1]
        rows = to_rows(tensor)
        keep = tensor.codec != "raw" and chunk.first_row + chunk.tokens < len(rows)
        self._decoded = (weakref.ref(tensor), rows) if keep else None
        return rows

    def _compute(self, model: SpanModel, held: Span, accepted: Sequence[_Accepted]) -> None:
        """Run them in as few passes as possible; their `outputs` are what is to be answered."""
        part = accepted[0].chunk.span
        first, last = part.start - held.start, part.end - held.start
        new = sum(each.chunk.tokens for each in accepted)

        def run(pieces: Sequence[_Piece]) -> None:
            arguments = [
                np.concatenate(arrays) for arrays in zip(*(piece.arrays() for piece in pieces), strict=True)
            ]
            output = self._with_room(model, new, lambda: model.run(first, last, *arguments))
            for piece in pieces:
                taken, output = output[: piece.outputs], output[piece.outputs :]
                piece.owner.outputs.append(taken)

        waiting: list[_Piece] = []
        room = self._batch_tokens
        for each in accepted:
            row = 0
            for segment, entry in zip(each.chunk.segments, each.entries, strict=True):
                if segment.start < entry.length:
                    if any(piece.entry is entry for piece in waiting):
                        run(waiting)
                        waiting, room = [], self._batch_tokens
                    self._sequences.cut(model, entry, segment.start)
                for done in _cuts(segment.count, room, self._batch_tokens):
                    if not room:
                        run(waiting)
                        waiting, room = [], self._batch_tokens
                    waiting.append(_Piece(each, entry, segment, row, *done))
                    room -= done[1] - done[0]
                row += segment.count
                entry.length = segment.start + segment.count
        if waiting:
            run(waiting)

    def _with_room(self, model: SpanModel, new: int, run: Callable[[], Rows]) -> Rows:
        """Let the cache grow when there are no cells left; ``new`` tokens are about to come."""
        try:
            return run()
        except NoCellsError:
            model.resize(max(model.cells * 3 // 2, self._sequences.cached_tokens + new))
            return run()

    def _undo(self, model: SpanModel, each: _Accepted) -> None:
        """Roll its sequences back to where the chunk began."""
        each.outputs.clear()
        for segment, entry in zip(each.chunk.segments, each.entries, strict=True):
            if entry.slot is not None:
                entry.length = min(entry.length, segment.start)
                model.remove(entry.slot, segment.start)

    def _repair(self, model: SpanModel) -> None:
        """Wipe what is cached and not finite: sequences are kept apart by factors of 0, and 0 · ∞ is none."""
        if model.layout is None:
            model.restore(model.whole_state())
            return
        state = read_state(memoryview(model.whole_state()), model.layout, whole=True)
        bad = np.flatnonzero(~state.sound(model.layout))
        self._sequences.lose_slots(model, {owner for at in bad for owner in state.owners[at]})
        model.restore(model.whole_state())

    def _alone(self, model: SpanModel, held: Span, each: _Accepted) -> Tensor | SwarmError:
        """One chunk of a batch in which something was not finite."""
        try:
            self._accept(each.index, each.chunk, held, {})
            self._compute(model, held, [each])
        except SwarmError as exc:
            self._undo(model, each)
            return exc
        if each.finite:
            return self._result(each)
        self._undo(model, each)
        self._repair(model)
        return InvalidStepError(f"blocks {each.chunk.span} gave values that are not finite")

    def _result(self, each: _Accepted) -> Tensor | SwarmError:
        rows = each.outputs[0] if len(each.outputs) == 1 else np.concatenate(each.outputs)
        if rows.base is not None and 2 * rows.nbytes < rows.base.nbytes:
            rows = rows.copy()  # who keeps it should not keep the whole batch
        if np.abs(rows).max() > LARGEST[self._dtype]:
            return InvalidStepError(
                f"blocks {each.chunk.span} gave values that are not finite in {self._dtype}; float32 has "
                f"more range"
            )
        try:
            return to_tensor("hidden", rows, self._dtype, each.chunk.codec)
        except SwarmError as exc:
            return exc


@attrs.frozen(eq=False)
class _Piece:
    """Consecutive rows of one segment, in one pass."""

    owner: _Accepted
    entry: CachedSequence
    segment: Segment
    row: int
    """Where the segment begins in the owner's rows."""
    first: int
    last: int
    """Its tokens, counted from the segment's first."""

    @property
    def outputs(self) -> int:
        if self.owner.chunk.reply == "all":
            return self.last - self.first
        return int(self.last == self.segment.count)

    def arrays(self) -> tuple[Rows, np.ndarray, np.ndarray, np.ndarray]:
        count = self.last - self.first
        start = self.segment.start + self.first
        wanted = np.full(count, self.owner.chunk.reply == "all")
        if self.last == self.segment.count:
            wanted[-1] = True
        return (
            self.owner.rows[self.row + self.first : self.row + self.last],
            np.arange(start, start + count, dtype=np.int32),
            np.full(count, self.entry.slot, np.int32),
            wanted,
        )


def _cuts(count: int, room: int, most: int) -> list[tuple[int, int]]:
    """``count`` tokens in pieces: the first takes what ``room`` there is, the others ``most`` at a time."""
    cuts, at, size = [], 0, room or most
    while at < count:
        cuts.append((at, min(count, at + size)))
        at, size = cuts[-1][1], most
    return cuts

"""The sequences of an executor, and which sequence of llama.cpp's context each of them is."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import attrs

from swarmcore.errors import CacheFullError, InvalidStepError, ServerMemoryError, SessionLostError
from swarmcore.executor.base import SequenceId
from swarmcore.executor.ggml.span_model import CELLS, SpanModel
from swarmcore.types import Span


@attrs.define(eq=False)
class CachedSequence:
    """One that has a reservation."""

    slot: int | None = None
    """Its number in the context; None as long as nothing is cached."""
    span: Span | None = None
    """The blocks that it goes through; with the slot."""
    length: int = 0
    room: int = 0
    """Tokens that are reserved."""
    lost: bool = False


class Sequences:
    """`reserve` and `release` are called on the event loop, all else in the compute thread.

    The caller keeps them apart: nothing happens to a sequence while the compute thread works on it.
    """

    def __init__(self, slots: int) -> None:
        """``slots`` is how many may have a cache at a time."""
        self.slots = slots
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self._released = deque[CachedSequence]()
        self._shrunk = deque[CachedSequence]()
        self._free = list(range(slots))

    def __len__(self) -> int:
        return len(self._sequences)

    def reserve(self, sequence: SequenceId, tokens: int) -> bool:
        """Let there be such a sequence. Cells are taken as tokens come; the engine's budget bounds them.

        Return whether it has more tokens than that, for `tidy` to forget.
        """
        entry = self._sequences.setdefault(sequence, CachedSequence())
        entry.room = tokens
        if shrunk := tokens < entry.length:
            self._shrunk.append(entry)
        return shrunk

    def release(self, sequence: SequenceId) -> bool:
        """Return whether there is something for `tidy` to do."""
        entry = self._sequences.pop(sequence, None)
        if entry is None:
            return False
        self._released.append(entry)
        return entry.slot is not None

    def entry(self, sequence: SequenceId) -> CachedSequence:
        """Raise `SessionLostError` for one without a reservation, and one whose cache is gone."""
        entry = self._sequences.get(sequence)
        if entry is None:
            raise SessionLostError(f"sequence {sequence} has been released")
        if entry.lost:
            raise SessionLostError("the attention cache of this sequence is lost on the server")
        return entry

    def cached(self, sequence: SequenceId) -> CachedSequence:
        """Raise `SessionLostError` for one without a cache."""
        entry = self._sequences.get(sequence)
        if entry is None or entry.slot is None:
            raise SessionLostError(f"sequence {sequence} has no cache here")
        return entry

    def begin(self, entry: CachedSequence, span: Span) -> None:
        """See to it that the sequence has a slot, for the blocks ``span``.

        Raise `InvalidStepError` for blocks that it did not begin with, `CacheFullError` when no slot is free.
        """
        if entry.slot is None:
            entry.slot, entry.span, entry.length = self._free_slot(), span, 0
        elif entry.span != span:
            raise InvalidStepError(
                f"a sequence that began in blocks {entry.span} cannot go on in blocks {span}"
            )

    def cut(self, model: SpanModel, entry: CachedSequence, length: int) -> None:
        """Roll the sequence back to ``length`` tokens, if it has more."""
        if entry.slot is not None and length < entry.length:
            entry.length = length
            model.remove(entry.slot, length)

    def lose_slots(self, model: SpanModel, slots: set[int]) -> None:
        """Forget what these have cached. Whoever goes on with it is told."""
        for entry in list(self._sequences.values()):
            if entry.slot in slots:
                self._give_back(model, entry)
                entry.lost = True

    def lose_all(self) -> None:
        """What they had cached is gone already, with its context."""
        self._released.clear()
        self._free = list(range(self.slots))
        for entry in list(self._sequences.values()):
            if entry.slot is not None:
                entry.slot, entry.length, entry.lost = None, 0, True

    def tidy(self, model: SpanModel) -> None:
        """Forget what was released, and give memory back that is far too much."""
        while self._released:
            self._give_back(model, self._released.popleft())
        while self._shrunk:
            entry = self._shrunk.popleft()
            self.cut(model, entry, entry.room)
        cached = self.cached_tokens
        if model.cells > CELLS and 4 * cached < model.cells:
            with suppress(ServerMemoryError):  # for as long as both are there
                model.resize(max(CELLS, 2 * cached))

    @property
    def cached_tokens(self) -> int:
        """At most so many cells are in use: sequences may have some in common."""
        return sum(entry.length for entry in list(self._sequences.values()))

    def reorder(self, model: SpanModel, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`. Nothing is copied: sequences have in common what they both hold."""
        entries = [self.entry(sequence) for sequence in sequences]
        copies: list[tuple[CachedSequence, int | None, Span | None, int]] = []
        for entry, at in zip(entries, sources, strict=True):
            source = entries[at]
            if source is entry:
                continue
            slot = None
            if source.slot is not None:
                slot = self._free_slot()
                model.copy(source.slot, slot, 0, source.length)
            copies.append((entry, slot, source.span, source.length))
        for entry, slot, span, length in copies:
            self._give_back(model, entry)
            entry.slot, entry.span, entry.length = slot, span, length

    def share_prefix(self, model: SpanModel, source: SequenceId, target: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.share_prefix`."""
        held, new = self.cached(source), self.entry(target)
        assert held.slot is not None
        if new.slot is not None or not 0 < tokens <= held.length:
            raise InvalidStepError(
                f"{tokens} tokens of a sequence of {held.length} cannot begin one of {new.length} tokens"
            )
        slot = self._free_slot()
        model.copy(held.slot, slot, 0, tokens)
        new.slot, new.span, new.length = slot, held.span, tokens

    def clear(self) -> None:
        self._sequences.clear()
        self._released.clear()
        self._shrunk.clear()

    def _free_slot(self) -> int:
        if not self._free:
            raise CacheFullError(
                f"llama.cpp holds {self.slots} sequences at a time, and there are so many; try again later, "
                f"or another server"
            )
        return self._free.pop()

    def _give_back(self, model: SpanModel, entry: CachedSequence) -> None:
        if entry.slot is not None:
            model.remove(entry.slot, 0)
            self._free.append(entry.slot)
        entry.slot, entry.span, entry.length = None, None, 0

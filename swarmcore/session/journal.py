"""What a session keeps of its stages' inputs, so that a stage that is lost can be rebuilt elsewhere.

The inputs of one stage are a `RowHistory`: the rows that every token had when it entered that block. A
server keeps one of its own outputs when it is asked to; the client's `Journal` has one for every stage: in
the paper, the client-side cache of section 3.2.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from swarmcore.errors import InvalidStepError, ProtocolError, SessionLostError, SwarmError
from swarmcore.wire.tensors import Tensor, joined

COMPACT_NBYTES = 16 << 20
"""Bytes that a history takes in, at least, before it looks for tensors of which little is left."""

MAX_UNSETTLED = 16
"""Steps that may be under way at a server, more than a client has at once; older ones were given up."""


class RowChange(Protocol):
    """What a step does to a history: reorder, roll back, append. A `Step` is one, and a `Chunk`."""

    @property
    def step(self) -> int: ...
    @property
    def starts(self) -> tuple[int, ...]: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def sources(self) -> tuple[int, ...]: ...


@attrs.frozen
class _Run:
    """Rows ``first_row:first_row + count`` of a tensor: positions ``start`` and on of a sequence."""

    start: int
    count: int
    tensor: Tensor
    first_row: int

    def copied(self) -> _Run:
        """The same rows in memory of their own."""
        rows = self.tensor.decode().rows(self.first_row, self.first_row + self.count)
        return _Run(self.start, self.count, attrs.evolve(rows, data=memoryview(bytearray(rows.data))), 0)


class RowHistory:
    """The rows of every sequence at one place between two blocks, from position 0 on.

    Rows are kept as they came, encoded, and decoded when they are read. Reordering copies references only. At
    most about twice the bytes of the rows are kept, whatever rollbacks and beams have left of the tensors.
    """

    def __init__(self, sequences: int) -> None:
        self._runs: list[list[_Run]] = [[] for _ in range(sequences)]
        self._room = COMPACT_NBYTES
        self.counted_nbytes = 0
        """At least `nbytes`, without looking for what is left of each tensor."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence."""
        return tuple(runs[-1].start + runs[-1].count if runs else 0 for runs in self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        tensors = {id(run.tensor): run.tensor for runs in self._runs for run in runs}
        return sum(tensor.data.nbytes for tensor in tensors.values())

    def apply(self, change: RowChange, rows: Tensor) -> None:
        """Do what a step does; ``rows`` are its ``[sum(lengths), width]``."""
        if change.sources:
            self._runs = [list(self._runs[source]) for source in change.sources]
        first_row = 0
        for sequence, (start, count) in enumerate(zip(change.starts, change.lengths, strict=True)):
            if count:
                self._truncate(sequence, start)
                self._runs[sequence].append(_Run(start, count, rows, first_row))
                first_row += count
        self._room -= rows.data.nbytes
        self.counted_nbytes += rows.data.nbytes
        if self._room < 0:
            self._compact()

    def begin_with(self, lengths: Sequence[int], rows: Tensor) -> None:
        """Each sequence begins with so many of ``rows``, and nothing else is here of those that have any."""
        first_row = 0
        for sequence, count in enumerate(lengths):
            if count:
                self._runs[sequence] = [_Run(0, count, rows, first_row)]
                first_row += count

    def lacks(self, positions: Sequence[int]) -> bool:
        """Whether the first rows of a sequence, which has some, are not here."""
        return any(
            position > 0 and (not runs or runs[0].start > 0)
            for position, runs in zip(positions, self._runs, strict=True)
        )

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget rows beyond ``lengths``."""
        for sequence, length in enumerate(lengths):
            self._truncate(sequence, length)

    def tensors(self, starts: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """The tensors, encoded, that some of these rows are in."""
        found: dict[int, Tensor] = {}
        for runs, start, count in zip(self._runs, starts, lengths, strict=False):
            for run in runs:
                if max(run.start, start) < min(run.start + run.count, start + count):
                    found[id(run.tensor)] = run.tensor
        return list(found.values())

    def rows(
        self, starts: Sequence[int], lengths: Sequence[int], known: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """The rows ``start:start + length`` of each sequence, one sequence after the other, decoded.

        ``known`` are decoded `tensors`, by the id of the encoded ones. Raise `InvalidStepError` when some of
        the rows are not here.
        """
        if not len(starts) == len(lengths) == len(self._runs) or min(*starts, *lengths) < 0:
            raise InvalidStepError(f"rows {tuple(starts)} + {tuple(lengths)} of {len(self._runs)} sequences")
        decoded = dict(known or {})
        parts: list[Tensor] = []
        for sequence, (start, count) in enumerate(zip(starts, lengths, strict=True)):
            position, end = start, start + count
            for run in self._runs[sequence]:
                first, last = max(run.start, position), min(run.start + run.count, end)
                if first != position or first >= last:
                    continue
                sample = decoded.get(id(run.tensor))
                if sample is None:
                    sample = decoded[id(run.tensor)] = run.tensor.decode()
                offset = run.first_row - run.start
                parts.append(sample.rows(first + offset, last + offset))
                position = last
            if position < end:
                raise InvalidStepError(
                    f"rows {position} to {end} of sequence {sequence} were asked for and are not kept"
                )
        if not parts:
            raise InvalidStepError("no rows were asked for")
        if len({part.dtype for part in parts}) > 1:  # of servers that compute in different ones
            parts = [part.widened() for part in parts]
        return attrs.evolve(joined(parts), name="hidden")

    def _truncate(self, sequence: int, length: int) -> None:
        runs = self._runs[sequence]
        while runs and runs[-1].start >= length:
            runs.pop()
        if runs and runs[-1].start + runs[-1].count > length:
            runs[-1] = attrs.evolve(runs[-1], count=length - runs[-1].start)

    def _compact(self) -> None:
        runs = {id(run): run for runs in self._runs for run in runs}
        used = Counter[int]()
        for run in runs.values():
            used[id(run.tensor)] += run.count
        copies: dict[int, _Run] = {}
        for key, run in runs.items():
            if 2 * used[id(run.tensor)] < run.tensor.shape[0]:
                with contextlib.suppress(SwarmError):  # it cannot be decoded: whoever reads it will be told
                    copies[key] = run.copied()
        self._runs = [[copies.get(id(run), run) for run in runs] for runs in self._runs]
        self.counted_nbytes = self.nbytes
        self._room = max(self.counted_nbytes, COMPACT_NBYTES)

    def __repr__(self) -> str:
        return f"<RowHistory {','.join(map(str, self.lengths))} rows>"


class OutputHistory:
    """What a server keeps of a session's outputs for a `Replay`: as the settled steps have left them.

    A step that is computed here may never get through the chain; until it has, its rows only wait here. Once
    all is `drop`ped, nothing is kept any more.
    """

    def __init__(self, sequences: int) -> None:
        self._history: RowHistory | None = RowHistory(sequences)
        self._unsettled: deque[tuple[RowChange, Tensor]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, or somewhat more."""
        nbytes = self._history.counted_nbytes if self._history is not None else 0
        return nbytes + sum(rows.data.nbytes for _, rows in self._unsettled)

    def drop(self) -> None:
        """Forget everything, for good."""
        self._history = None
        self._unsettled.clear()

    def keep(self, change: RowChange, rows: Tensor, *, settled: bool = False) -> None:
        """The outputs of a step, ``[sum(lengths), width]``; of a replay, which is of ``settled`` tokens."""
        if self._history is None:
            return
        if settled:
            self._history.apply(change, rows)
        else:
            self._unsettled.append((change, rows))
            if len(self._unsettled) > MAX_UNSETTLED:
                self._history.apply(*self._unsettled.popleft())

    def forget(self, first: int, end: int) -> None:
        """The steps ``first`` to ``end``, the end excluded, were given up."""
        self._unsettled = deque(kept for kept in self._unsettled if not first <= kept[0].step < end)

    def settle(self, below: int) -> None:
        """All steps with a lower number are through, or were given up and are overwritten."""
        while self._history is not None and self._unsettled and self._unsettled[0][0].step < below:
            self._history.apply(*self._unsettled.popleft())

    @property
    def settled(self) -> RowHistory:
        """The outputs of the settled steps. Raise `SessionLostError` when they were dropped."""
        if self._history is None:
            raise SessionLostError(
                "what the session had computed here had to make room; replay it from the stage before"
            )
        return self._history


class _StageInputs:
    """The history of one stage's inputs, and what is about to enter it.

    Rows arrive some time before or after their step is settled. They enter the history in the order of the
    settled steps, so that it is always what it was after one of them.
    """

    def __init__(self, sequences: int) -> None:
        self.history = RowHistory(sequences)
        self.arrived: dict[int, Tensor] = {}
        self.due: deque[RowChange] = deque()

    def settle(self, change: RowChange) -> None:
        self.due.append(change)
        self.advance()

    def advance(self) -> None:
        while self.due and self.due[0].step in self.arrived:
            change = self.due.popleft()
            self.history.apply(change, self.arrived.pop(change.step))

    def keep(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Give up on rows that are due; return how many of each sequence, up to ``positions``, are good."""
        due, self.due = self.due, deque()
        good = self.history.lengths
        if any(change.sources for change in due):
            good = (0,) * len(good)
        for change in due:
            good = tuple(
                min(have, start) if count else have
                for have, start, count in zip(good, change.starts, change.lengths, strict=True)
            )
        good = tuple(map(min, good, positions))
        self.history.truncate(good)
        return good


class Journal:
    """The inputs of a session's stages, by the block at which each begins.

    Steps in flight are held beside the histories until they are settled or forgotten. A plain object.
    """

    def __init__(self, sequences: int, blocks: Iterable[int]) -> None:
        self._sequences = sequences
        self._inputs = {block: _StageInputs(sequences) for block in blocks}
        self._in_flight: dict[int, int] = {}

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks whose inputs are kept."""
        return frozenset(self._inputs)

    @property
    def nbytes(self) -> int:
        return sum(inputs.history.nbytes for inputs in self._inputs.values())

    def begin(self, step: int, rows: int) -> None:
        """A step of so many rows has left: those that come with its number are to be kept."""
        self._in_flight[step] = rows

    def receive(self, block: int, step: int, rows: Tensor) -> bool:
        """Rows with which a step entered ``block``. False when nobody needs them (any more).

        Raise `ProtocolError` when they are not those of the step.
        """
        inputs = self._inputs.get(block)
        if inputs is None or step in inputs.arrived:
            return False
        expected = self._in_flight.get(step)
        if expected is None:
            expected = next((sum(change.lengths) for change in inputs.due if change.step == step), None)
            if expected is None:
                return False
        if rows.shape[0] != expected:
            raise ProtocolError(f"{rows.shape[0]} rows of a step of {expected} for block {block}")
        inputs.arrived[step] = rows
        inputs.advance()
        return True

    def settle(self, change: RowChange) -> None:
        """The step is through: its tokens are part of the session."""
        self._in_flight.pop(change.step, None)
        for inputs in self._inputs.values():
            inputs.settle(change)

    def forget(self, step: int) -> None:
        """The step was given up."""
        self._in_flight.pop(step, None)
        for inputs in self._inputs.values():
            inputs.arrived.pop(step, None)

    def has(self, block: int, step: int) -> bool:
        """Whether the rows with which a step in flight enters ``block`` are here."""
        inputs = self._inputs.get(block)
        return inputs is not None and step in inputs.arrived

    def in_flight(self, block: int, step: int) -> Tensor:
        """These rows, as they came."""
        return self._inputs[block].arrived[step]

    def complete(self, block: int) -> bool:
        """Whether the rows of all settled steps have come in."""
        inputs = self._inputs.get(block)
        return inputs is not None and not inputs.due

    def begin_with(self, block: int, lengths: Sequence[int], rows: Tensor) -> None:
        """The sequences begin with ``rows`` that the servers have computed before: no step brings them."""
        if (inputs := self._inputs.get(block)) is not None:
            inputs.history.begin_with(lengths, rows)

    def lacks(self, block: int, positions: Sequence[int]) -> bool:
        """Whether the first rows of some sequence never came to ``block``, which has to be `complete`."""
        inputs = self._inputs.get(block)
        return inputs is None or inputs.history.lacks(positions)

    def rows(self, block: int, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """As `RowHistory.rows`. The history has to be `complete`."""
        return self._inputs[block].history.rows(starts, lengths)

    def rebuild(self, block: int, positions: Sequence[int]) -> tuple[int, ...]:
        """The server that feeds ``block`` is gone: what it still owed will be computed again.

        Return how many rows of each sequence are here, up to ``positions``; `expect` says what follows.
        """
        inputs = self._inputs.setdefault(block, _StageInputs(self._sequences))
        return inputs.keep(positions)

    def expect(self, block: int, change: RowChange) -> None:
        """A replay with this number will bring rows into ``block``."""
        self._inputs[block].settle(change)

    def keep_only(self, blocks: Iterable[int]) -> None:
        """Drop the places at which no stage begins any more."""
        wanted = set(blocks)
        for block in self._inputs.keys() - wanted:
            del self._inputs[block]

    def __repr__(self) -> str:
        places = ", ".join(
            f"{block}: {max(inputs.history.lengths)}" for block, inputs in sorted(self._inputs.items())
        )
        return f"<Journal {places}>"

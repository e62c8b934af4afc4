"""The client's side of a session, without I/O: positions, step numbers, and each step's way along the chain.

A *lap* is one trip of new tokens through all stages. A long lap is cut into chunks, each a step of its own,
that follow each other through the chain so that stages overlap.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import attrs

from swarmcore.errors import InvalidStepError, ProtocolError
from swarmcore.wire.messages import Hop, Step, StepOutput

Reply = Literal["all", "last"]


@attrs.frozen
class Chunk:
    """A part of a lap: rows ``first_row:first_row + rows`` of its hidden states, sent as step ``step``."""

    step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    first_row: int

    @property
    def rows(self) -> int:
        return sum(self.lengths)


@attrs.frozen
class Lap:
    """New tokens of some sequences, in chunks, and where the sequences will stand when it is done."""

    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    reply: Reply

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))


class SessionLaps:
    """Numbers the steps of a session and routes them along its chain.

    ``hops`` are the stages in order. ``carried`` are stages that cannot reach the next one: the client takes
    their output back and sends it on itself. `received` adds to them what it hears of.
    """

    def __init__(self, hops: Sequence[Hop], *, sequences: int, carried: Collection[int] = ()) -> None:
        self.hops = tuple(hops)
        self.positions: tuple[int, ...] = (0,) * sequences
        self._next_step = 0
        self._carried = set(carried)

    @property
    def carried(self) -> frozenset[int]:
        """Stages whose output the client carries to the next stage."""
        return frozenset(self._carried)

    def rollback(self, positions: Sequence[int]) -> None:
        """Forget what is cached beyond ``positions``. Raise `InvalidStepError` for one that is not cached."""
        if len(positions) != len(self.positions) or any(
            not 0 <= new <= old for new, old in zip(positions, self.positions, strict=True)
        ):
            raise InvalidStepError(f"cannot roll back to {tuple(positions)} from {self.positions}")
        self.positions = tuple(positions)

    def begin(
        self, lengths: Sequence[int], starts: Sequence[int] | None, reply: Reply, *, chunk_rows: int
    ) -> Lap:
        """Plan the lap for ``lengths`` new tokens of each sequence, from ``starts`` (default: `positions`).

        A start below a sequence's position rolls it back. Raise `InvalidStepError` for counts that do not
        match the session, an empty lap, or a start beyond what is cached.
        """
        lengths = tuple(lengths)
        starts = self.positions if starts is None else tuple(starts)
        if len(lengths) != len(self.positions) or len(starts) != len(self.positions):
            raise InvalidStepError(
                f"a lap needs one length and one start for each of the session's {len(self.positions)} "
                f"sequences, got {len(lengths)} lengths and {len(starts)} starts"
            )
        if min(lengths) < 0 or not any(lengths):
            raise InvalidStepError(f"lengths {lengths} must not be negative, nor all zero")
        for sequence, (start, position) in enumerate(zip(starts, self.positions, strict=True)):
            if not 0 <= start <= position:
                raise InvalidStepError(
                    f"sequence {sequence} cannot start at {start}: positions 0 to {position} are cached"
                )
        return Lap(tuple(self._chunks(starts, lengths, chunk_rows)), starts, lengths, reply)

    def commit(self, lap: Lap) -> None:
        """The lap came home: its tokens are cached on every stage."""
        self.positions = lap.ends

    def abandon(self, lap: Lap) -> None:
        """The lap failed: what it started from is kept, whatever the stages have cached beyond it."""
        self.positions = tuple(map(min, lap.starts, self.positions))

    def step_for(self, stage: int, chunk: Chunk, lap: Lap, *, codec: str, deadline: float) -> Step:
        """The step to send to ``stage`` so that ``chunk`` goes on from there."""
        last = next((i for i in range(stage, len(self.hops)) if i in self._carried), len(self.hops) - 1)
        return Step(
            step=chunk.step,
            starts=chunk.starts,
            lengths=chunk.lengths,
            chain=self.hops[stage + 1 : last + 1],
            reply=lap.reply if last == len(self.hops) - 1 else "all",
            codec=codec,
            deadline=deadline,
        )

    def received(self, stage: int, output: StepOutput) -> int | None:
        """Take note of what ``stage`` sent; return the stage to carry it to, or None when it is the end.

        Raise `ProtocolError` when the server claims other blocks than those it was asked to run.
        """
        if output.blocks_done != self.hops[stage].end:
            raise ProtocolError(
                f"server {self.hops[stage].peer} sent the output of block {output.blocks_done}, "
                f"expected {self.hops[stage].end}"
            )
        if stage == len(self.hops) - 1:
            return None
        if output.undelivered:
            self._carried.add(stage)
        return stage + 1

    def _chunks(self, starts: tuple[int, ...], lengths: tuple[int, ...], chunk_rows: int) -> list[Chunk]:
        chunks = []
        done = [0] * len(lengths)
        first_row = 0
        # Rows are ordered by sequence; a chunk takes the next ``chunk_rows`` of them.
        while first_row < sum(lengths):
            room = chunk_rows
            take = []
            for sequence, length in enumerate(lengths):
                count = min(room, length - done[sequence])
                take.append(count)
                room -= count
            chunk_starts = tuple(map(int.__add__, starts, done))
            chunks.append(Chunk(self._next_step, chunk_starts, tuple(take), first_row))
            self._next_step += 1
            first_row += sum(take)
            done = list(map(int.__add__, done, take))
        return chunks

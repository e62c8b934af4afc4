"""The client's side of a session, without I/O: positions, step numbers, and which servers each step visits.

A step of a session brings new tokens through all stages. A long one is cut into chunks, each a `Step` of its
own on the wire, that follow each other through the chain so that stages overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Literal

import attrs

from swarmcore.errors import InvalidStepError, ProtocolError, SwarmError
from swarmcore.wire.messages import Hop, Recall, Step, StepForwarded, StepOutput
from swarmcore.wire.tensors import Tensor, joined

Reply = Literal["all", "last", "none"]

JournalMode = Literal["client", "servers", "off"]
"""Who keeps the inputs of a session's stages: see `Step.journal`."""


@attrs.frozen
class Chunk:
    """A part of a step: rows ``first_row:first_row + rows`` of its hidden states, sent as step ``step``."""

    step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    first_row: int
    sources: tuple[int, ...] = ()
    """How the sequences are reordered before, as in `Step.sources`."""
    reply: Reply = "last"
    until: int | None = None
    """The block before which it ends; None for the model's end."""
    replay: bool = False

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def answer_rows(self) -> int:
        """Rows of the answer to it."""
        if self.reply == "none":
            return 0
        return self.rows if self.reply == "all" else sum(length > 0 for length in self.lengths)


@attrs.frozen
class StepPlan:
    """New tokens of some sequences, in chunks, and where the sequences will stand when it is done."""

    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    reply: Reply
    sources: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """Number of its first chunk; later steps have higher ones."""
        return self.chunks[0].step

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """The rows of the step from its chunks' outputs."""
        if len(outputs) == 1:
            return outputs[0]
        if len({output.dtype for output in outputs}) > 1:  # another server took over in the middle
            outputs = [output.widened() for output in outputs]
        parts, last = list(outputs), dict[int, Tensor]()
        if self.reply != "all":
            # Each chunk answers with the last row it has of every sequence; a later chunk's row replaces it.
            for chunk, output in zip(self.chunks, outputs, strict=True):
                for row, sequence in enumerate(i for i, length in enumerate(chunk.lengths) if length):
                    last[sequence] = output.rows(row, row + 1)
            parts = [last[sequence] for sequence in sorted(last)]
        return joined(parts)


class SentStep:
    """A step that was sent: `InferenceSession.receive` gives what comes of it."""

    def __init__(self, plan: StepPlan, hidden: Tensor) -> None:
        self.plan = plan
        self.hidden = hidden
        self.outputs: list[Tensor] = []
        """What has come of its first chunks."""
        self.ended_at: float | None = None
        """The loop's time at which all had come of it that will."""
        self._error: SwarmError | None = None
        self._ended = asyncio.Event()

    def end(self, error: SwarmError | None = None) -> None:
        """It is through, or has come to nothing; harmless when repeated."""
        if not self.ended:
            self.ended_at, self._error = asyncio.get_running_loop().time(), error
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether all has come of it that will."""
        return self.ended_at is not None

    @property
    def error(self) -> SwarmError | None:
        """Why it has come to nothing, once it has."""
        return self._error

    async def wait(self) -> None:
        """Until it has ended."""
        await self._ended.wait()

    async def result(self) -> Tensor:
        """Its rows, once it has ended. Raise why it came to nothing."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self.plan.joined(self.outputs)

    def __repr__(self) -> str:
        state = "ended" if self.ended else f"{len(self.outputs)}/{len(self.plan.chunks)} chunks"
        return f"<SentStep {self.plan.first} · {sum(self.plan.lengths)} rows · {state}>"


class SessionSteps:
    """Numbers the steps of a session and routes them along its chain.

    ``hops`` are the stages in order. ``carried`` are stages that cannot reach the next one: the client takes
    their output back and sends it on itself. `received` adds those that say so.
    """

    def __init__(self, hops: Sequence[Hop], *, sequences: int, carried: Collection[int] = ()) -> None:
        self.hops = tuple(hops)
        self.positions: tuple[int, ...] = (0,) * sequences
        """Where the steps that have come back end: what a new stage has to be given."""
        self.planned = self.positions
        """Where the next step starts at most: where those under way will end, less what was rolled back."""
        self.settled = 0
        """Steps below this number have come back."""
        self.next_step = 0
        """Number of the step that is planned next."""
        self._carried = set(carried)
        self._under_way: list[StepPlan] = []

    @property
    def carried(self) -> frozenset[int]:
        """Stages whose output the client carries to the next stage."""
        return frozenset(self._carried)

    def rollback(self, positions: Sequence[int]) -> None:
        """Have the next step start at ``positions``, or below. Raise `InvalidStepError` for one beyond
        `planned`."""
        if len(positions) != len(self.planned) or any(
            not 0 <= new <= old for new, old in zip(positions, self.planned, strict=True)
        ):
            raise InvalidStepError(f"cannot roll back to {tuple(positions)} from {self.planned}")
        self._plan_from(positions)

    def begin_at(self, positions: Sequence[int]) -> None:
        """The sequences begin with so many tokens that no step brings."""
        self.positions = self.planned = tuple(positions)

    def _plan_from(self, positions: Sequence[int]) -> None:
        self.planned = tuple(positions)
        # What is under way builds on all that has come back, also where a later step is to start below.
        if not self._under_way:
            self.positions = tuple(map(min, self.positions, self.planned))

    def replace(self, first: int, last: int, hops: Sequence[Hop], *, carried: Collection[int] = ()) -> None:
        """Put ``hops`` in the place of stages ``first`` to ``last``; ``carried`` are indices into ``hops``.

        The stage before them is trusted again to reach the one that follows it.
        """
        grown = len(hops) - (last - first + 1)
        kept = {s if s < first else s + grown for s in self._carried if not first <= s <= last}
        self._carried = (kept | {first + stage for stage in carried}) - {first - 1}
        self.hops = (*self.hops[:first], *hops, *self.hops[last + 1 :])

    def begin(
        self,
        lengths: Sequence[int],
        starts: Sequence[int] | None,
        reply: Reply,
        *,
        chunk_rows: int,
        sources: Sequence[int] = (),
    ) -> StepPlan:
        """Plan a step of ``lengths`` new tokens of each sequence, from ``starts`` (default: `planned`).

        It goes behind the steps that are under way. With ``sources``, of which there may be none then,
        sequence ``i`` first becomes a copy of sequence ``sources[i]``. A start below a sequence's end, after
        that, rolls it back. Raise `InvalidStepError` for counts that do not match the session, an empty step,
        a source that is not there, or a start beyond what will be cached.
        """
        lengths, sources = tuple(lengths), tuple(sources)
        if sources and (
            len(sources) != len(self.positions) or not all(0 <= s < len(sources) for s in sources)
        ):
            raise InvalidStepError(
                f"sources {sources} do not name one of the {len(self.positions)} sequences for each of them"
            )
        if sources and self._under_way:
            raise InvalidStepError("a step that reorders its sequences cannot go behind others under way")
        positions = tuple(self.planned[source] for source in sources) if sources else self.planned
        starts = positions if starts is None else tuple(starts)
        if len(lengths) != len(self.positions) or len(starts) != len(self.positions):
            raise InvalidStepError(
                f"a step needs one length and one start for each of the session's {len(self.positions)} "
                f"sequences, got {len(lengths)} lengths and {len(starts)} starts"
            )
        if min(lengths) < 0 or not any(lengths):
            raise InvalidStepError(f"lengths {lengths} must not be negative, nor all zero")
        for sequence, (start, position) in enumerate(zip(starts, positions, strict=True)):
            if not 0 <= start <= position:
                raise InvalidStepError(
                    f"sequence {sequence} cannot start at {start}: positions 0 to {position} are cached"
                )
        chunks = self._chunks(starts, lengths, sources, reply, chunk_rows)
        plan = StepPlan(tuple(chunks), starts, lengths, reply, sources)
        self._under_way.append(plan)
        self.planned = tuple(map(int.__add__, starts, lengths))
        return plan

    def settle(self, chunk: Chunk) -> None:
        """The chunk is through: its tokens are cached on every stage. Chunks end in their order."""
        self.positions = tuple(map(int.__add__, chunk.starts, chunk.lengths))
        self.settled = chunk.step + 1
        if chunk is self._under_way[0].chunks[-1]:
            del self._under_way[0]
            self._plan_from(self.planned)

    def abandon(self, plans: Sequence[StepPlan]) -> Recall:
        """These steps, the latest that were begun, are of no more use, whether they have come back or not.

        What the first of them started from is kept, whatever stages have cached beyond it. Return what to
        tell the stages.
        """
        reordering = any(map(self.reordering, plans))
        self._under_way = [plan for plan in self._under_way if plan not in plans]
        starts = [self.positions] if reordering else [self.planned, *(plan.starts for plan in plans)]
        self._plan_from([min(each) for each in zip(*starts, strict=True)])
        return Recall(plans[0].first, self.next_step)

    def reordering(self, plan: StepPlan) -> bool:
        """Whether stages may have reordered their sequences for a step of which nothing has come back."""
        return bool(plan.sources) and self.settled <= plan.first

    def replay(
        self, starts: Sequence[int], ends: Sequence[int], *, until: int, reply: Reply, chunk_rows: int
    ) -> list[Chunk]:
        """Chunks that bring tokens of the session to stages which are new to it, up to block ``until``."""
        lengths = tuple(max(end - start, 0) for start, end in zip(starts, ends, strict=True))
        plain = self._chunks(tuple(starts), lengths, (), reply, chunk_rows)
        return [attrs.evolve(chunk, until=until, replay=True) for chunk in plain]

    def step_for(
        self,
        stage: int,
        chunk: Chunk,
        *,
        codec: str,
        deadline: float,
        journal: JournalMode = "off",
        attempt: int = 0,
    ) -> Step:
        """The step to send to ``stage`` so that ``chunk`` goes on from there."""
        goal = len(self.hops) - 1
        if chunk.until is not None:
            goal = next(i for i in range(stage, len(self.hops)) if self.hops[i].end == chunk.until)
        last = next((i for i in range(stage, goal) if i in self._carried), goal)
        return Step(
            step=chunk.step,
            starts=chunk.starts,
            lengths=chunk.lengths,
            chain=self.hops[stage + 1 : last + 1],
            reply=chunk.reply if last == goal else "all",
            codec=codec,
            deadline=deadline,
            sources=chunk.sources,
            journal=journal,
            settled=self.settled,
            attempt=attempt,
            replay=chunk.replay,
        )

    def received(self, stage: int, output: StepOutput | StepForwarded, *, current: bool = True) -> int | None:
        """Take note of what ``stage`` sent; return the stage to carry it to, or None when it is the end.

        A step that is not ``current`` was sent before the chain changed: that it could not be delivered says
        nothing of the chain that there is now. Raise `ProtocolError` when the server claims other blocks than
        those it was asked to run.
        """
        if output.blocks_done != self.hops[stage].end:
            raise ProtocolError(
                f"server {self.hops[stage].peer} sent the output of block {output.blocks_done}, "
                f"expected {self.hops[stage].end}"
            )
        if stage == len(self.hops) - 1:
            return None
        if isinstance(output, StepOutput) and output.undelivered and current:
            self._carried.add(stage)
        return stage + 1

    def _chunks(
        self,
        starts: tuple[int, ...],
        lengths: tuple[int, ...],
        sources: tuple[int, ...],
        reply: Reply,
        chunk_rows: int,
    ) -> list[Chunk]:
        chunks: list[Chunk] = []
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
            reorder = () if chunks else sources
            chunks.append(Chunk(self.next_step, chunk_starts, tuple(take), first_row, reorder, reply))
            self.next_step += 1
            first_row += sum(take)
            done = list(map(int.__add__, done, take))
        return chunks

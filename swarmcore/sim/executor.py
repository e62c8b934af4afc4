"""A simulated executor: takes the time that a real one would, and computes what shows if it was wrong."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

import attrs

from swarmcore.errors import InvalidStepError, SessionLostError, SpanError, SwarmError
from swarmcore.executor.base import (
    Adapter,
    BlockExecutor,
    ForwardPass,
    ScheduledChunk,
    SequenceId,
    TrainingBatch,
)
from swarmcore.sim.costs import BatchLoad, MeasuredModel
from swarmcore.sim.forward_backward import SimAdapter, SimBackward, SimForward, check_batch
from swarmcore.sim.model import MASK, SimModel, next_state, pack_rows, unpack_rows
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

PAGE = 16


@attrs.define(eq=False)
class _Sequence:
    reserved: int = 0
    states: list[int] = attrs.field(factory=list)
    """The hash of the sequence after each of its cached tokens."""
    blocks: int = 0
    """How many blocks its cache is of."""


class SimExecutor(BlockExecutor):
    """Holds blocks of a `SimModel`; each batch takes what ``costs`` says, over ``speed``."""

    def __init__(self, sim_model: SimModel, span: Span, costs: MeasuredModel, *, speed: float = 1.0) -> None:
        self.model = sim_model.info
        self.span = span
        self.dtype = "float32"
        self.cache_bytes_per_token = costs.cache_bytes * len(span)
        self.page = PAGE
        self.busy_seconds = 0.0
        """Time spent on batches so far."""
        self._sim_model = sim_model
        self._costs = costs
        self._speed = speed
        self._sequences: dict[SequenceId, _Sequence] = {}

    def __repr__(self) -> str:
        return f"<SimExecutor {self.model.name} {self.span} · {len(self._sequences)} sequences>"

    def seconds(self, blocks: int, load: BatchLoad) -> float:
        """How long a batch takes here."""
        return self._costs.costs.seconds(blocks, load) / self._speed

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        takes = self.seconds(len(batch[0].span), BatchLoad.of(batch))
        self.busy_seconds += takes
        await asyncio.sleep(takes)
        return [self._run(part) for part in batch]

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> SimAdapter:
        return SimAdapter(tensors)

    def forward(self, batch: TrainingBatch, *, keep: bool = False) -> SimForward:
        check_batch(self.model, self.span, batch, batch.hidden)
        return SimForward(
            self._sim_model, batch, self._spend, keep_row_bytes=self._costs.row_bytes if keep else 0
        )

    def backward(
        self,
        batch: TrainingBatch,
        gradients: Tensor,
        *,
        kept: ForwardPass | None = None,
        inputs: bool = True,
        weights: bool = False,
    ) -> SimBackward:
        check_batch(self.model, self.span, batch, gradients)
        assert kept is None or isinstance(kept, SimForward)
        return SimBackward(
            self._sim_model,
            batch,
            gradients,
            self._spend,
            kept,
            inputs=inputs,
            weights=weights,
            row_bytes=self._costs.row_bytes,
        )

    async def _spend(self, load: BatchLoad, times: float) -> None:
        # What a batch takes once is spread over its blocks, one of which is a unit of a pass.
        takes = times * self.seconds(len(self.span), load) / len(self.span)
        self.busy_seconds += takes
        await asyncio.sleep(takes)

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        self._sequences.setdefault(sequence, _Sequence()).reserved = tokens

    def release(self, sequence: SequenceId) -> None:
        self._sequences.pop(sequence, None)

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        before = [self._sequences[sequence].states for sequence in sequences]
        for sequence, source in zip(sequences, sources, strict=True):
            self._sequences[sequence].states = list(before[source])

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        held = self._sequences.get(sequence)
        if held is None or not held.states:
            raise SessionLostError("the sequence has no cache here")
        if start + count > len(held.states):
            raise InvalidStepError(f"positions {start} to {start + count} are not all cached")
        states = held.states[start : start + count]
        # As many copies as there are blocks, so that a part weighs what it would.
        data = memoryview(array("Q", [state for state in states for _ in range(held.blocks)])).cast("B")
        return (Tensor("states", "int64", (count, held.blocks), data),)

    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        held = self._sequences[sequence]
        shapes = [(tensor.name, tensor.shape) for tensor in tensors]
        if shapes != [("states", (count, len(span)))] or not 0 <= start <= len(held.states):
            raise InvalidStepError(
                f"this is no cache of positions {start} to {start + count} of blocks {span}"
            )
        copies = array("Q", bytes(tensors[0].decode().data))
        held.states[start:] = copies[:: len(span)]
        held.blocks = len(span)

    async def change_span(self, span: Span) -> None:
        if not self.model.span.covers(span):
            raise SpanError(f"{self.model.name} has no blocks {span}; it has {self.model.blocks}")
        stays = self.span.overlap(span) or span
        coming = len(span) - (len(stays) if stays != span or span == self.span else 0)
        self.span = stays
        await asyncio.sleep(coming * self._costs.load_seconds / self._speed)
        self.span = span
        self.cache_bytes_per_token = self._costs.cache_bytes * len(span)

    async def close(self) -> None:
        self._sequences.clear()

    def _run(self, part: ScheduledChunk) -> Tensor | SwarmError:
        rows = unpack_rows(part.hidden)
        weight = self._sim_model.weight(part.span)
        at = 2 * part.first_row
        answer: list[int] = []
        for segment in part.segments:
            held = self._sequences.get(segment.sequence)
            if held is None:  # the session was closed meanwhile; nobody waits for this
                return InvalidStepError("the sequence is not here")
            states = held.states
            end = segment.start + segment.count
            if segment.start > len(states) or end > held.reserved:
                return InvalidStepError(
                    f"positions {segment.start} to {end} do not follow on {len(states)} cached tokens, with "
                    f"{held.reserved} reserved"
                )
            del states[segment.start :]
            held.blocks = len(part.span)
            state = states[-1] if states else 0
            for _ in range(segment.count):
                token = rows[at]
                state = next_state(state, token)
                states.append(state)
                if part.reply == "all" or len(states) == end:
                    answer += (token, (rows[at + 1] + weight * state) & MASK)
                at += 2
        return pack_rows(answer).encode(part.codec)

"""A simulated executor: takes the time that a real one would, and computes what shows if it was wrong."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

from swarmcore.errors import InvalidStepError, SwarmError
from swarmcore.executor.base import Adapter, ScheduledChunk, TrainingBatch
from swarmcore.sim.costs import BatchLoad, MeasuredModel
from swarmcore.sim.model import MASK, SimModel, next_state, pack_rows, unpack_rows
from swarmcore.testing.fake_executor import FakeBackward, FakeExecutor, FakeForward, Unit
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

PAGE = 16

BACKWARD = 2.0
"""What a backward pass takes, in forward passes of the same rows; recomputing adds one."""


class SimExecutor(FakeExecutor[int]):
    """Holds blocks of a `SimModel`; each batch takes what ``costs`` says, over ``speed``.

    The hash of the sequence after each of its tokens is what is cached.
    """

    def __init__(self, sim_model: SimModel, span: Span, costs: MeasuredModel, *, speed: float = 1.0) -> None:
        super().__init__(sim_model.info, span, page=PAGE, cache_bytes=costs.cache_bytes)
        self.busy_seconds = 0.0
        """Time spent on batches so far."""
        self._sim_model = sim_model
        self._costs = costs
        self._speed = speed

    def __repr__(self) -> str:
        return f"<SimExecutor {self.model.name} {self.span} · {len(self._reserved)} sequences>"

    # --- time --------------------------------------------------------------------------------------------

    def seconds(self, blocks: int, load: BatchLoad) -> float:
        """How long a batch takes here."""
        return self._costs.costs.seconds(blocks, load) / self._speed

    async def spend_step(self, batch: Sequence[ScheduledChunk]) -> None:
        await self._spend(self.seconds(len(batch[0].span), BatchLoad.of(batch)))

    async def spend_unit(self, lengths: Sequence[int], forwards: float) -> None:
        load = BatchLoad.of_prompts(lengths)
        # What a batch takes once is spread over its blocks, one of which is a unit of a pass.
        await self._spend(forwards * self.seconds(len(self.span), load) / len(self.span))

    async def spend_loading(self, blocks: int) -> None:
        await asyncio.sleep(blocks * self._costs.load_seconds / self._speed)

    async def _spend(self, seconds: float) -> None:
        self.busy_seconds += seconds
        await asyncio.sleep(seconds)

    # --- the arithmetic ----------------------------------------------------------------------------------

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> SimAdapter:
        return SimAdapter(tensors)

    def begin_forward(self, batch: TrainingBatch, keep: bool) -> SimForward:
        return SimForward(self, batch, keep, self._sim_model, self._costs.row_bytes)

    def begin_backward(
        self, batch: TrainingBatch, gradients: Tensor, forward: FakeForward, *, inputs: bool, weights: bool
    ) -> SimBackward:
        return SimBackward(self, batch, gradients, forward, self._sim_model, inputs=inputs, weights=weights)

    def cache_layout(self, count: int, span: Span) -> tuple[str, tuple[int, ...]]:
        return "int64", (count, len(span))

    def pack_cache(self, states: Sequence[int], span: Span) -> memoryview:
        # As many copies as there are blocks, so that a part weighs what it would.
        return memoryview(array("Q", [state for state in states for _ in range(len(span))])).cast("B")

    def unpack_cache(self, data: memoryview, span: Span) -> list[int]:
        return array("Q", bytes(data))[:: len(span)].tolist()

    def run_chunk(self, chunk: ScheduledChunk) -> Tensor | SwarmError:
        rows = unpack_rows(chunk.hidden)
        weight = self._sim_model.weight(chunk.span)
        prefix = chunk.adapter.prefix_tokens if chunk.adapter else 0
        at = 2 * chunk.first_row
        answer: list[int] = []
        for segment in chunk.segments:
            sequence, end = segment.sequence, segment.start + segment.count
            cached, reserved = self.cached(sequence), self._reserved.get(sequence, 0)
            # A session that was closed meanwhile has no cache; nobody waits for this then.
            if segment.start > cached or prefix + end > reserved:
                return InvalidStepError(
                    f"positions {segment.start} to {end} do not follow on {cached} cached tokens, with "
                    f"{reserved} reserved"
                )
            states = self.roll_back(sequence, segment.start, prefix + end, chunk.span)
            state = states[-1] if states else 0
            for _ in range(segment.count):
                token = rows[at]
                state = next_state(state, token)
                states.append(state)
                if chunk.reply == "all" or len(states) == end:
                    answer += (token, (rows[at + 1] + weight * state) & MASK)
                at += 2
        return pack_rows(answer).encode(chunk.codec)


class SimAdapter(Adapter):
    """Weights of which only the size is known."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        blocks = [int(tensor.name.partition(".")[0]) for tensor in tensors]
        self.span = Span(min(blocks), max(blocks) + 1)
        self.nbytes = sum(tensor.decoded_nbytes for tensor in tensors)
        self.layout = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
        self.prefix_tokens = max(
            (tensor.shape[1] for tensor in tensors if tensor.name.endswith(".prefix")), default=0
        )


class SimForward(FakeForward):
    """Its rows go through all blocks at the end, together."""

    def __init__(
        self, executor: SimExecutor, batch: TrainingBatch, keep: bool, model: SimModel, row_bytes: int
    ) -> None:
        """``row_bytes`` are what activations of a row take in a block."""
        super().__init__(executor, batch, keep)
        self.token_bytes = float(row_bytes if keep else 0)
        self._model = model

    def run(self, unit: Unit) -> None:
        if self.keep:
            self.kept_bytes += int(self.token_bytes) * sum(self.batch.lengths[unit.first : unit.end])
        if unit.last:
            self.outputs = self._model.forward(self.batch.hidden, self.batch.span)


class SimBackward(FakeBackward):
    """Its gradients depend on those of the outputs and on the inputs; those of the weights are zeros."""

    forwards = BACKWARD

    def __init__(
        self,
        executor: SimExecutor,
        batch: TrainingBatch,
        gradients: Tensor,
        forward: FakeForward,
        model: SimModel,
        *,
        inputs: bool,
        weights: bool,
    ) -> None:
        super().__init__(executor, batch, forward)
        self.token_bytes = forward.token_bytes
        self._model = model
        self._given, self._inputs, self._weights = gradients, inputs, weights

    def run(self, unit: Unit) -> None:
        if not unit.last:
            return
        if self._inputs:
            self.gradients = self._model.backward(self._given, self._forward.batch.hidden, self.batch.span)
        if self._weights and isinstance(adapter := self.batch.adapter, SimAdapter):
            self.weights = tuple(
                _zeros(name, dtype, shape)
                for name, dtype, shape in adapter.layout
                if int(name.partition(".")[0]) in self.batch.span
            )


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    tensor = Tensor(name, dtype, shape, memoryview(b""))
    return Tensor(name, dtype, shape, memoryview(bytes(tensor.decoded_nbytes)))

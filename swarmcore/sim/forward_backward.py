"""Simulated forward and backward passes: as long as real ones, with numbers that show if one went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from swarmcore.errors import InvalidBatchError, SpanError
from swarmcore.executor.base import Adapter, BackwardPass, ForwardPass, TrainingBatch
from swarmcore.sim.costs import BatchLoad
from swarmcore.sim.model import SimModel
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import Tensor

BACKWARD = 2.0
"""What a backward pass takes, in forward passes of the same rows; recomputing adds one."""

Spend = Callable[[BatchLoad, float], Awaitable[None]]
"""Let the time pass that a load takes through one block, so many times."""


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


class SimForward(ForwardPass):
    """A unit is as many whole sequences as fit, through one block."""

    def __init__(
        self, model: SimModel, batch: TrainingBatch, spend: Spend, *, keep_row_bytes: int = 0
    ) -> None:
        """``keep_row_bytes`` are what activations of a row take in a block; 0 when they are not kept."""
        self.through = False
        self.hidden = batch.hidden
        self._model, self._batch, self._spend, self._keep = model, batch, spend, keep_row_bytes
        self._units = _Units(batch)
        self.token_bytes = float(keep_row_bytes)

    async def advance(self, max_tokens: int) -> bool:
        load, self.through = self._units.next(max_tokens)
        began = asyncio.get_running_loop().time()
        await self._spend(load, 1.0)
        self.seconds += asyncio.get_running_loop().time() - began
        self.kept_bytes += load.prefill_rows * self._keep
        if self.through:
            self.outputs = self._model.forward(self.hidden, self._batch.span)
        return self.through

    def forget(self) -> None:
        self._keep = self.kept_bytes = 0

    def close(self) -> None:
        self.kept_bytes = 0


class SimBackward(BackwardPass):
    """First the forward units again, unless they were kept."""

    def __init__(
        self,
        model: SimModel,
        batch: TrainingBatch,
        gradients: Tensor,
        spend: Spend,
        kept: SimForward | None,
        *,
        inputs: bool,
        weights: bool,
        row_bytes: int,
    ) -> None:
        """``row_bytes`` are what activations of a row take in a block."""
        self.token_bytes = float(row_bytes)
        self._model, self._batch, self._spend, self._kept = model, batch, spend, kept
        self._above, self._inputs, self._weights = gradients, inputs, weights
        self._recompute = _Units(batch) if kept is None else None
        self._units = _Units(batch)

    async def advance(self, max_tokens: int) -> bool:
        last = False
        if self._recompute is not None:
            load, through = self._recompute.next(max_tokens)
            takes = 1.0
            if through:
                self._recompute = None
        else:
            load, last = self._units.next(max_tokens)
            takes = BACKWARD
        began = asyncio.get_running_loop().time()
        await self._spend(load, takes)
        self.seconds += asyncio.get_running_loop().time() - began
        if last:
            self._finish()
        return last

    def _finish(self) -> None:
        adapter = self._batch.adapter
        if self._inputs:
            hidden = self._batch.hidden if self._kept is None else self._kept.hidden
            self.gradients = self._model.backward(self._above, hidden, self._batch.span)
        if self._weights and isinstance(adapter, SimAdapter):
            self.weights = tuple(
                empty(name, dtype, shape)
                for name, dtype, shape in adapter.layout
                if int(name.partition(".")[0]) in self._batch.span
            )

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


class _Units:
    """What of a batch comes next."""

    def __init__(self, batch: TrainingBatch) -> None:
        self._lengths = batch.lengths
        self._blocks, self._next = len(batch.span), 0

    def next(self, max_tokens: int) -> tuple[BatchLoad, bool]:
        """Some sequences through one block, and whether they are the last of the last block."""
        rows = attended = 0
        for length in self._lengths[self._next :]:
            if rows and rows + length > max_tokens:
                break
            rows, attended = rows + length, attended + length * (length - 1) // 2
            self._next += 1
        if self._next == len(self._lengths):
            self._blocks, self._next = self._blocks - 1, 0
        return BatchLoad(prefill_rows=rows, prefill_attended=attended), self._blocks == 0


def check_batch(model: ModelInfo, held: Span, batch: TrainingBatch, rows: Tensor) -> None:
    """Raise `SpanError` for blocks that are not held, `InvalidBatchError` for rows that do not fit."""
    if not held.covers(batch.span):
        raise SpanError(f"blocks {batch.span} are not all of {held}")
    if rows.shape != (batch.tokens, model.hidden_size) or not all(length > 0 for length in batch.lengths):
        raise InvalidBatchError(f"rows of shape {list(rows.shape)} for sequences of {batch.lengths} tokens")


def empty(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros."""
    tensor = Tensor(name, dtype, shape, memoryview(b""))
    return Tensor(name, dtype, shape, memoryview(bytes(tensor.decoded_nbytes)))

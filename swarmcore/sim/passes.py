"""Simulated forward and backward passes: they take the time that real ones would; their rows are empty."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from swarmcore.errors import InvalidBatchError, SpanError
from swarmcore.executor.passes import Adapter, BackwardPass, ForwardPass, SequenceBatch
from swarmcore.sim.costs import BatchLoad
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

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

    def __init__(self, batch: SequenceBatch, spend: Spend, *, keep: bool = False) -> None:
        self.through = False
        self._batch, self._spend, self._keep = batch, spend, keep
        self._units = _Units(batch)

    async def advance(self, max_tokens: int) -> bool:
        load, self.through = self._units.next(max_tokens)
        began = asyncio.get_running_loop().time()
        await self._spend(load, 1.0)
        self.seconds += asyncio.get_running_loop().time() - began
        if self._keep:
            hidden = self._batch.hidden
            self.kept_bytes += load.prefill_rows * hidden.shape[1] * ITEM_BYTES[hidden.dtype]
        if self.through:
            self.outputs = empty_rows(self._batch)
        return self.through

    def close(self) -> None:
        self.kept_bytes = 0


class SimBackward(BackwardPass):
    """First the forward units again, unless they were kept."""

    def __init__(
        self, batch: SequenceBatch, spend: Spend, kept: ForwardPass | None, inputs: bool, weights: bool
    ) -> None:
        self._batch, self._spend, self._kept = batch, spend, kept
        self._inputs, self._weights = inputs, weights
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
            self.gradients = empty_rows(self._batch)
        if self._weights and isinstance(adapter, SimAdapter):
            self.weights = tuple(empty(name, dtype, shape) for name, dtype, shape in adapter.layout)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


class _Units:
    """What of a batch comes next."""

    def __init__(self, batch: SequenceBatch) -> None:
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


def check_batch(model: ModelInfo, held: Span, batch: SequenceBatch, rows: Tensor) -> None:
    """Raise `SpanError` for blocks that are not held, `InvalidBatchError` for rows that do not fit."""
    if not held.start <= batch.span.start < batch.span.end <= held.end:
        raise SpanError(f"blocks {batch.span} are not all of {held}")
    if rows.shape != (batch.tokens, model.hidden_size) or not all(length > 0 for length in batch.lengths):
        raise InvalidBatchError(f"rows of shape {list(rows.shape)} for sequences of {batch.lengths} tokens")


def empty_rows(batch: SequenceBatch) -> Tensor:
    """The rows that come out of a batch."""
    return empty("hidden", batch.hidden.dtype, batch.hidden.shape)


def empty(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros."""
    tensor = Tensor(name, dtype, shape, memoryview(b""))
    return Tensor(name, dtype, shape, memoryview(bytes(tensor.decoded_nbytes)))

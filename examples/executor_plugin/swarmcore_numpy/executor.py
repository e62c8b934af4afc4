"""The executor: sequences with their caches, computed in a thread of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from swarmcore.errors import InternalError, InvalidStepError, SessionLostError, SpanError, SwarmError
from swarmcore.executor.base import Adapter, BlockExecutor, ScheduledChunk, SequenceId
from swarmcore.types import ModelInfo, Numerics, Progress, Span
from swarmcore.wire.tensors import FLOATS, Tensor
from swarmcore_numpy.llama import Array, Block, Shape

Load = Callable[[Span, Progress | None], dict[int, Block]]
"""Reads blocks; runs in a thread."""


class CachedSequence:
    """One sequence's attention cache, ``[blocks, keys or values, room, kv heads, head]``, and its length."""

    def __init__(self, span: Span, shape: Shape) -> None:
        self.span = span
        self.length = 0
        self.cache = np.zeros((len(span), 2, 0, shape.kv_heads, shape.head), np.float32)

    def fit(self, room: int) -> None:
        """Room for so many tokens; what is cached stays."""
        if self.cache.shape[2] != room:
            grown = np.zeros((*self.cache.shape[:2], room, *self.cache.shape[3:]), np.float32)
            self.length = min(self.length, room)
            grown[:, :, : self.length] = self.cache[:, :, : self.length]
            self.cache = grown


class NumpyExecutor(BlockExecutor):
    """Runs a span in float32. The defaults of `BlockExecutor` refuse adapters, and batches for training."""

    dtype = "float32"
    numerics = Numerics("numpy", weights="f32", dtype="f32", cache_dtype="f32")
    page = 64

    def __init__(
        self, model: ModelInfo, span: Span, shape: Shape, load: Load, progress: Progress | None = None
    ) -> None:
        self.model = model
        self.span = span
        self._shape = shape
        self._load = load
        self._blocks = load(span, progress)
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self._reserved: dict[SequenceId, int] = {}
        self._compute = ThreadPoolExecutor(1, "numpy-compute")
        self._loading = ThreadPoolExecutor(1, "numpy-load")
        self._closed = False

    def __repr__(self) -> str:
        return f"<NumpyExecutor {self.model.name} {self.span} · {len(self._sequences)} sequences>"

    @property
    def cache_bytes_per_token(self) -> int:  # type: ignore[override]
        return len(self.span) * 2 * self._shape.kv_heads * self._shape.head * 4

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`; the chunks are computed one by one, each reads the weights for itself."""
        return await self._in_thread(lambda: [self._run(part) for part in batch])

    def _run(self, part: ScheduledChunk) -> Tensor | SwarmError:
        try:
            rows = self._rows(part)
            lengths = {segment.sequence: segment.start for segment in part.segments}
            done, outputs = 0, []
            for segment in part.segments:
                output = self._segment(
                    segment.sequence, part.span, segment.start, rows[done : done + segment.count]
                )
                done += segment.count
                outputs.append(output if part.reply == "all" else output[-1:])
            answer = np.concatenate(outputs)
            if not np.isfinite(answer).all():
                for sequence, start in lengths.items():
                    self._sequences[sequence].length = start
                raise InvalidStepError("the step gives values that are not finite")
        except SwarmError as exc:
            return exc
        return _tensor("hidden", answer).encode(part.codec)

    def _rows(self, part: ScheduledChunk) -> Array:
        given, width = part.hidden, self.model.hidden_size
        if given.dtype not in FLOATS or len(given.shape) != 2 or given.shape[1] != width:
            raise InvalidStepError(
                f"hidden states of {given.dtype} {list(given.shape)}; expected [tokens, {width}]"
            )
        if part.first_row + part.tokens > given.shape[0]:
            raise InvalidStepError(f"hidden states of {given.shape[0]} rows end before the step does")
        raw = given.decode().widened()
        rows = np.frombuffer(raw.data, "<f4").reshape(given.shape)
        rows = rows[part.first_row : part.first_row + part.tokens].astype(np.float32)
        if not np.isfinite(rows).all():
            raise InvalidStepError("hidden states hold values that are not finite")
        return rows

    def _segment(self, name: SequenceId, span: Span, start: int, rows: Array) -> Array:
        sequence = self._sequence(name, span, start)
        for place, block in enumerate(range(span.start, span.end)):
            keys, values = sequence.cache[place]
            rows = self._blocks[block].run(rows, keys, values, start)
        sequence.length = start + len(rows)
        return rows

    def _sequence(self, name: SequenceId, span: Span, start: int) -> CachedSequence:
        """The sequence, rolled back to ``start``, with the room that is reserved for it."""
        if not all(block in self._blocks for block in range(span.start, span.end)):
            raise SpanError(f"blocks {span} are not held")
        sequence = self._sequences.get(name)
        if start > (sequence.length if sequence else 0) or (sequence and sequence.span != span):
            raise InvalidStepError(f"position {start} of blocks {span} does not follow on what is cached")
        if sequence is None:
            sequence = self._sequences[name] = CachedSequence(span, self._shape)
        sequence.fit(self._reserved.get(name, 0))
        sequence.length = start
        return sequence

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        await self._in_thread(self._reorder, sequences, sources)

    def _reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        held = [self._sequences.get(sequences[source]) for source in sources]
        for name, source in zip(sequences, held, strict=True):
            self._sequences.pop(name, None)
            if source is not None:
                copy = self._sequences[name] = CachedSequence(source.span, self._shape)
                copy.cache, copy.length = source.cache.copy(), source.length
                copy.fit(self._reserved.get(name, 0))

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        return await self._in_thread(self._export, sequence, start, count)

    def _export(self, name: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        if (sequence := self._sequences.get(name)) is None:
            raise SessionLostError(f"sequence {name} has no cache")
        if start < 0 or count < 1 or start + count > sequence.length:
            raise InvalidStepError(f"positions {start} to {start + count} are not cached")
        return (_tensor("cache", sequence.cache[:, :, start : start + count]),)

    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        await self._in_thread(self._import, sequence, span, start, count, tensors)

    def _import(
        self, name: SequenceId, span: Span, start: int, count: int, tensors: Sequence[Tensor]
    ) -> None:
        shape = (len(span), 2, count, self._shape.kv_heads, self._shape.head)
        layout = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
        if layout != [("cache", "float32", shape, "raw")] or tensors[0].data.nbytes != 4 * math.prod(shape):
            raise InvalidStepError(f"a cache of layout {layout}; expected float32 {list(shape)}")
        taken = self._sequence(name, span, start)
        taken.cache[:, :, start : start + count] = np.frombuffer(tensors[0].data, "<f4").reshape(shape)
        taken.length = start + count

    async def change_span(self, span: Span) -> None:
        if not 0 <= span.start < span.end <= self.model.blocks:
            raise SpanError(f"blocks {span} are not in a model of {self.model.blocks} blocks")
        stays = Span(max(span.start, self.span.start), min(span.end, self.span.end))
        self.span = stays if stays.start < stays.end else span
        await self._in_thread(self._drop, span)  # not while a step passes through them
        loop = asyncio.get_running_loop()
        missing = [block for block in range(span.start, span.end) if block not in self._blocks]
        for block in missing:
            loaded = await loop.run_in_executor(self._loading, self._load, Span(block, block + 1), None)
            self._blocks |= loaded
        self.span = span

    def _drop(self, span: Span) -> None:
        self._blocks = {number: block for number, block in self._blocks.items() if number in span}

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        self._reserved[sequence] = tokens

    def release(self, sequence: SequenceId) -> None:
        self._reserved.pop(sequence, None)
        self._sequences.pop(sequence, None)

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._compute.shutdown)
        await asyncio.to_thread(self._loading.shutdown)
        self._blocks.clear()
        self._sequences.clear()

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        if self._closed:
            raise InternalError("the executor is closed")
        return await asyncio.get_running_loop().run_in_executor(self._compute, partial(work, *args))


def _tensor(name: str, values: Array) -> Tensor:
    data = memoryview(np.ascontiguousarray(values, "<f4")).cast("B")
    return Tensor(name, "float32", values.shape, data)

"""An executor without a model: exact arithmetic in which every misrouted, reordered or stale token shows.

Where a transformer block would attend to its cache, a block here folds each row into a running state that
depends on the block's index, the position and every row before it. The same rows give bitwise the same
result, however they are cut into chunks, packed into batches or spread over servers.
"""

from __future__ import annotations

import asyncio
import math
import struct
from array import array
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from swarmcore.errors import InvalidBatchError, InvalidStepError, SessionLostError, SpanError, SwarmError
from swarmcore.executor.base import (
    Adapter,
    BackwardPass,
    BlockExecutor,
    ForwardPass,
    ScheduledChunk,
    Segment,
    SequenceId,
    TrainingBatch,
)
from swarmcore.testing.forward_backward import CountingAdapter, CountingBackward, CountingForward
from swarmcore.testing.rows import Rows as Rows
from swarmcore.testing.rows import hidden_states as hidden_states
from swarmcore.testing.rows import read_rows as read_rows
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import Tensor

COUNTING_MODEL = ModelInfo("counting", "counting-1", blocks=12, hidden_size=4)


class CountingExecutor(BlockExecutor):
    """Computes at once, on the event loop, with plain floats: keep the sizes tiny.

    It checks what its caller owes every executor, and raises `AssertionError` when that is broken: calls of
    `step` do not overlap, positions follow on, cache is reserved before it is used, a batch is of one span,
    blocks that leave have no sessions. ``tokens`` is the cache it has, through the span that it begins with.
    """

    def __init__(
        self, span: Span | None = None, *, model: ModelInfo = COUNTING_MODEL, page: int = 4, tokens: int = 0
    ) -> None:
        self.model = model
        self.span = span or Span(0, model.blocks)
        self.dtype = "float32"
        self.cache_bytes_per_token = 8 * model.hidden_size * len(self.span)
        self.page = page
        self.gate: asyncio.Event | None = None
        """When set, each batch waits for this event before it computes."""
        self.failures: deque[Exception] = deque()
        """Raised by the next calls of `step`, one each."""
        self.step_seconds = 0.0
        """Loop time that each row of a batch takes."""
        self.loading: asyncio.Event | None = None
        """When set, `change_span` waits for this event before it has loaded."""
        self.load_failures: deque[Exception] = deque()
        """Raised by the next calls of `change_span` in place of loading, one each."""
        self.batches: deque[tuple[int, ...]] = deque(maxlen=1000)
        """Tokens of each slice of the last batches."""
        self.pass_gate: asyncio.Event | None = None
        """When set, each unit of a pass waits for this event before it computes."""
        self.pass_failures: deque[Exception] = deque()
        """Raised by the next units, one each."""
        self.pass_seconds = 0.0
        """Loop time that each token of a unit takes."""
        self.units: deque[tuple[str, int]] = deque(maxlen=1000)
        """Kind and tokens of the last batches and units, in their order: ``"step"``, ``"unit"``."""
        self.passes: set[ForwardPass | BackwardPass] = set()
        """Begun and not closed, those that keep activations included."""
        self.computing = False
        self.closed = False
        self._busy: set[SequenceId] = set()
        self._loaded: Span | None = self.span
        self._changing = False
        self._tokens, self._blocks = tokens, len(self.span)
        self._reserved: dict[SequenceId, int] = {}
        self._spans: dict[SequenceId, Span] = {}
        self._caches: dict[SequenceId, list[Rows]] = {}

    @property
    def reserved_tokens(self) -> int:
        """Tokens reserved for all sequences."""
        return sum(self._reserved.values())

    def cached(self, sequence: SequenceId) -> int:
        """How many tokens of the sequence are cached."""
        return len(self._caches.get(sequence, ()))

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        assert not self.computing, "step was called while another step computes"
        assert not self.closed, "step was called after close"
        assert self._loaded is not None, "step was called before any blocks were loaded"
        self.computing = True
        try:
            _check_batch(batch, self._loaded)
            self._busy = {segment.sequence for part in batch for segment in part.segments}
            self.batches.append(tuple(part.tokens for part in batch))
            self.units.append(("step", sum(part.tokens for part in batch)))
            if self.gate is not None:
                await self.gate.wait()
            if self.step_seconds:
                await asyncio.sleep(self.step_seconds * sum(part.tokens for part in batch))
            if self.failures:
                raise self.failures.popleft()
            return [self._run(part) for part in batch]
        finally:
            self.computing = False
            self._busy = set()

    # --- passes ------------------------------------------------------------------------------------------

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> CountingAdapter:
        return CountingAdapter(tensors, scaling, self.model.hidden_size)

    def forward(self, batch: TrainingBatch, *, keep: bool = False) -> CountingForward:
        self._check_pass(batch, batch.hidden)
        found = CountingForward(self, batch, _counting(batch.adapter), keep)
        self.passes.add(found)
        return found

    def backward(
        self,
        batch: TrainingBatch,
        gradients: Tensor,
        *,
        kept: ForwardPass | None = None,
        inputs: bool = True,
        weights: bool = False,
    ) -> CountingBackward:
        self._check_pass(batch, gradients)
        forward = kept
        if forward is None:
            forward = self.forward(batch, keep=True)
        assert isinstance(forward, CountingForward) and not forward.closed, "a pass that is closed was given"
        if kept is not None:
            assert forward.through and forward.inputs, "a pass was given that kept nothing"
            assert (kept_of := forward.batch).span == batch.span and kept_of.lengths == batch.lengths
            assert kept_of.adapter is batch.adapter, "a pass was given that had another adapter"
        adapter = _counting(batch.adapter)
        found = CountingBackward(self, batch, gradients, adapter, forward, inputs, weights)
        self.passes.add(found)
        return found

    def on_close(self, closed: ForwardPass | BackwardPass) -> None:
        """One of `passes` was closed."""
        self.passes.remove(closed)

    @asynccontextmanager
    async def unit(self, tokens: int) -> AsyncIterator[None]:
        """What surrounds the computation of a unit."""
        assert not self.computing, "a pass was advanced while something computes"
        assert not self.closed, "a pass was advanced after close"
        self.computing = True
        try:
            self.units.append(("unit", tokens))
            if self.pass_gate is not None:
                await self.pass_gate.wait()
            if self.pass_seconds:
                await asyncio.sleep(self.pass_seconds * tokens)
            if self.pass_failures:
                raise self.pass_failures.popleft()
            yield
        finally:
            self.computing = False

    def _check_pass(self, batch: TrainingBatch, rows: Tensor) -> None:
        span, held = batch.span, self._loaded
        if held is None or not held.covers(span):
            raise SpanError(f"blocks {span} are not all of {held}")
        shape = (batch.tokens, self.model.hidden_size)
        if not batch.lengths or min(batch.lengths) < 1 or rows.shape != shape:
            raise InvalidBatchError(f"rows of shape {list(rows.shape)} for {batch.lengths}; expected {shape}")

    # --- caches ------------------------------------------------------------------------------------------

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        assert not self.computing, "reorder was called while a step computes"
        assert len(sequences) == len(sources), "reorder has not one source for each sequence"
        held = [self._caches.get(sequences[source]) for source in sources]
        spans = [self._spans.get(sequences[source]) for source in sources]
        for sequence, cache, span in zip(sequences, held, spans, strict=True):
            self._caches.pop(sequence, None)
            self._spans.pop(sequence, None)
            if cache is not None and span is not None:
                room = self._reserved.get(sequence, 0)
                self._caches[sequence], self._spans[sequence] = cache[:room], span

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        assert sequence not in self._busy, "a sequence was exported while it was in a batch"
        if (cache := self._caches.get(sequence)) is None:
            raise SessionLostError(f"sequence {sequence} has no cache")
        if start < 0 or count < 1 or start + count > len(cache):
            raise InvalidStepError(
                f"positions {start} to {start + count} are not in a cache of {len(cache)} tokens"
            )
        values = [x for token in cache[start : start + count] for block in token for x in block]
        shape = (count, len(self._spans[sequence]), self.model.hidden_size, 8)
        return (Tensor("states", "uint8", shape, memoryview(struct.pack(f"<{len(values)}d", *values))),)

    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        assert sequence not in self._busy, "a sequence was imported while it was in a batch"
        shape = (count, len(span), self.model.hidden_size, 8)
        layout = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
        if layout != [("states", "uint8", shape, "raw")] or tensors[0].data.nbytes != math.prod(shape):
            raise InvalidStepError(f"a cache of layout {layout}; expected states of {list(shape)} bytes")
        if not 0 <= start <= self.cached(sequence) or self._spans.get(sequence, span) != span:
            raise InvalidStepError(f"a cache from position {start} on does not follow on what is cached")
        cache = self._cache(Segment(sequence, start, count), span)
        values = struct.unpack(f"<{math.prod(shape) // 8}d", tensors[0].data)
        rows = [list(values[at : at + shape[2]]) for at in range(0, len(values), shape[2])]
        cache += [rows[at : at + len(span)] for at in range(0, len(rows), len(span))]

    async def change_span(self, span: Span) -> None:
        assert not self._changing, "change_span was called while the span changes"
        if not self.model.span.covers(span):
            raise SpanError(f"blocks {span} are not in a model of {self.model.blocks} blocks")
        held = self._loaded or span
        kept = held.overlap(span) if self._loaded else None
        for left in self._spans.values():
            inside = kept is not None and kept.covers(left)
            assert inside, f"blocks {left} leave while a sequence passes through them"
        for begun in self.passes:
            assert isinstance(begun, CountingForward | CountingBackward)
            left = begun.batch.span
            inside = kept is not None and kept.covers(left)
            assert inside, f"blocks {left} leave while a pass goes through them"
        self._changing = True
        self._hold(kept or span, loaded=kept is not None)
        try:
            if self.loading is not None:
                await self.loading.wait()
            if self.load_failures:
                raise self.load_failures.popleft()
            self._hold(span, loaded=True)
        finally:
            self._changing = False

    def _hold(self, span: Span, *, loaded: bool) -> None:
        self.span, self._loaded = span, span if loaded else None
        self.cache_bytes_per_token = 8 * self.model.hidden_size * len(span)

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        assert tokens % self.page == 0, f"{tokens} tokens were reserved, not whole pages of {self.page}"
        self._reserved[sequence] = tokens
        self._check_room()

    def _check_room(self) -> None:
        """A sequence counts for the share of the blocks that it passes through, once that is known."""
        shares = ((n, len(self._spans.get(sequence, ()))) for sequence, n in self._reserved.items())
        used = sum(tokens * blocks for tokens, blocks in shares) / self._blocks
        assert not self._tokens or used <= self._tokens, (
            f"{used} tokens are reserved; there is room for {self._tokens}"
        )

    def release(self, sequence: SequenceId) -> None:
        self._reserved.pop(sequence, None)
        self._caches.pop(sequence, None)
        self._spans.pop(sequence, None)

    async def close(self) -> None:
        self.closed = True
        self._caches.clear()
        self._reserved.clear()

    def _run(self, part: ScheduledChunk) -> Tensor | SwarmError:
        try:
            rows = read_rows(part.hidden)[part.first_row : part.first_row + part.tokens]
        except SwarmError as exc:
            return exc
        assert len(rows) == part.tokens, "the slice reaches past its hidden states"
        answer: Rows = []
        for segment in part.segments:
            cache = self._cache(segment, part.span, prefix=part.adapter.prefix_tokens if part.adapter else 0)
            taken, rows = rows[: segment.count], rows[segment.count :]
            if not all(math.isfinite(value) for row in taken for value in row):
                return InvalidStepError(f"hidden states from position {segment.start} on are not finite")
            outputs = [self._token(cache, row, part) for row in taken]
            answer += outputs if part.reply == "all" else outputs[-1:]
        return hidden_states(answer).encode(part.codec)

    def _cache(self, segment: Segment, span: Span, prefix: int = 0) -> list[Rows]:
        """For each cached token, the states of the span's blocks; rolled back to the segment's start."""
        sequence = segment.sequence
        assert self._spans.setdefault(sequence, span) == span, "a sequence changed its span"
        cache = self._caches.setdefault(sequence, [])
        assert segment.start <= len(cache), f"position {segment.start} is ahead of {len(cache)} cached tokens"
        self._check_room()
        end = prefix + segment.start + segment.count
        assert end <= self._reserved.get(sequence, 0), f"cache for {end} tokens was not reserved"
        del cache[segment.start :]
        return cache

    def _token(self, cache: list[Rows], row: list[float], part: ScheduledChunk) -> list[float]:
        adapter = _counting(part.adapter)
        before = cache[-1] if cache else [[0.0] * len(row) for _ in range(len(part.span))]
        position, states = len(cache), []
        for block, state in enumerate(before, part.span.start):
            if adapter is not None:
                row = [x + y for x, y in zip(row, adapter.change(block, row), strict=True)]
            # Tripling, modulo 1, keeps every earlier token in the low digits instead of fading it out.
            offset = 0.37 * (block + 1) + 0.11 * position
            state = [math.fmod(3 * s + x + offset, 1.0) for s, x in zip(state, row, strict=True)]
            states.append(state)
            row = list(array("f", state))
        cache.append(states)
        return row


def _counting(adapter: Adapter | None) -> CountingAdapter | None:
    assert adapter is None or isinstance(adapter, CountingAdapter), "an adapter of another executor was given"
    return adapter


def _check_batch(batch: Sequence[ScheduledChunk], held: Span) -> None:
    assert batch, "step was called without a slice"
    spans = {part.span for part in batch}
    assert len(spans) == 1, f"one batch has slices of several spans: {spans}"
    span = spans.pop()
    assert held.covers(span), f"blocks {span} are not all of {held}"
    sequences = [segment.sequence for part in batch for segment in part.segments]
    assert len(sequences) == len(set(sequences)), "a sequence is twice in one batch"
    assert all(segment.count > 0 for part in batch for segment in part.segments), "a segment is empty"

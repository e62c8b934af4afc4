"""What executors without a model have in common: caches, spans, and batches that are run in units.

`CountingExecutor` is for tests: its arithmetic has true gradients, shows every token that went astray, and
takes no time unless a test asks for it. `SimExecutor` is for swarms of a thousand servers: its arithmetic is
cheap however many blocks there are, and it takes the time that a real one would. Both check here what their
caller owes every executor.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import attrs

from swarmcore.errors import InvalidBatchError, InvalidStepError, SessionLostError, SpanError, SwarmError
from swarmcore.executor.base import (
    Adapter,
    BackwardPass,
    BlockExecutor,
    ForwardPass,
    ScheduledChunk,
    SequenceId,
    TrainingBatch,
    TrainingPass,
)
from swarmcore.types import ADAPTERS, TRAINING, ModelInfo, Numerics, Span
from swarmcore.wire.tensors import Tensor

State = TypeVar("State")
"""What is cached of a token."""


class FakeExecutor(BlockExecutor, Generic[State]):
    """Computes on the event loop. Subclasses have the arithmetic, and the time that it takes.

    It raises `AssertionError` when its caller breaks a rule of the seam: calls do not overlap, positions
    follow on, cache is reserved before it is used, a batch is of one span, and blocks that leave have no
    sessions.
    """

    dtype = "float32"
    prefix_sharing = "copies"
    numerics = Numerics("fake", "f32", "f32", "f32")
    capabilities = frozenset({TRAINING, ADAPTERS})

    def __init__(self, model: ModelInfo, span: Span, *, page: int, cache_bytes: int) -> None:
        """``cache_bytes`` of attention cache take a token in one block."""
        self.model = model
        self.page = page
        self.passes: set[TrainingPass] = set()
        """Begun and not closed, those that keep activations included."""
        self.computing = False
        self.closed = False
        self._busy: set[SequenceId] = set()
        self._cache_bytes = cache_bytes
        self._changing = False
        self._loaded: Span | None = None
        self._hold(span)
        self._reserved: dict[SequenceId, int] = {}
        self._spans: dict[SequenceId, Span] = {}
        self._caches: dict[SequenceId, list[State]] = {}

    # --- what subclasses compute, and how long it takes --------------------------------------------------

    @abstractmethod
    async def spend_step(self, batch: Sequence[ScheduledChunk]) -> None:
        """Let the time of a batch pass, or raise what `step` is to raise."""

    @abstractmethod
    async def spend_unit(self, lengths: Sequence[int], forwards: float) -> None:
        """Let the time of sequences through one block pass: that of so many forward passes."""

    @abstractmethod
    async def spend_loading(self, blocks: int) -> None:
        """Let the time pass that it takes to load blocks, or raise what `change_span` is to raise."""

    @abstractmethod
    def run_chunk(self, chunk: ScheduledChunk) -> Tensor | SwarmError:
        """The rows through all blocks of the chunk's span."""

    @abstractmethod
    def begin_forward(self, batch: TrainingBatch, keep: bool) -> FakeForward:
        """A forward pass of a batch that fits."""

    @abstractmethod
    def begin_backward(
        self, batch: TrainingBatch, gradients: Tensor, forward: FakeForward, *, inputs: bool, weights: bool
    ) -> FakeBackward:
        """A backward pass of a batch that fits; ``forward`` may still have to be run."""

    @abstractmethod
    def cache_layout(self, count: int, span: Span) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of an exported cache."""

    @abstractmethod
    def pack_cache(self, states: Sequence[State], span: Span) -> memoryview:
        """The bytes of an exported cache."""

    @abstractmethod
    def unpack_cache(self, data: memoryview, span: Span) -> list[State]:
        """The inverse of `pack_cache`."""

    # --- steps and batches without a cache ---------------------------------------------------------------

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        assert not self.computing, "step was called while another step computes"
        assert not self.closed, "step was called after close"
        assert self._loaded is not None, "step was called before any blocks were loaded"
        self.computing = True
        try:
            self._busy = _check_step(batch, self._loaded)
            await self.spend_step(batch)
            return [self.run_chunk(chunk) for chunk in batch]
        finally:
            self.computing = False
            self._busy = set()

    async def run_unit(self, lengths: Sequence[int], forwards: float) -> None:
        """What comes before the computation of a unit, by a pass."""
        assert not self.computing, "a pass was advanced while something computes"
        assert not self.closed, "a pass was advanced after close"
        self.computing = True
        try:
            await self.spend_unit(lengths, forwards)
        finally:
            self.computing = False

    def forward(self, batch: TrainingBatch, *, keep: bool = False) -> FakeForward:
        self._check_batch(batch, batch.hidden)
        found = self.begin_forward(batch, keep)
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
    ) -> FakeBackward:
        self._check_batch(batch, gradients)
        forward = self.forward(batch, keep=True) if kept is None else kept
        assert isinstance(forward, FakeForward) and not forward.closed, "a pass that is closed was given"
        if kept is not None:
            assert forward.through and forward.keep, "a pass was given that kept nothing"
            assert (kept_of := forward.batch).span == batch.span and kept_of.lengths == batch.lengths
            assert kept_of.adapter is batch.adapter, "a pass was given that had another adapter"
        found = self.begin_backward(batch, gradients, forward, inputs=inputs, weights=weights)
        self.passes.add(found)
        return found

    def _check_batch(self, batch: TrainingBatch, rows: Tensor) -> None:
        span, held = batch.span, self._loaded
        if held is None or not held.covers(span):
            raise SpanError(f"blocks {span} are not all of {held}")
        shape = (batch.tokens, self.model.hidden_size)
        if not batch.lengths or min(batch.lengths) < 1 or rows.shape != shape:
            raise InvalidBatchError(f"rows of shape {list(rows.shape)} for {batch.lengths}; expected {shape}")

    # --- caches ------------------------------------------------------------------------------------------

    def cached(self, sequence: SequenceId) -> int:
        """How many tokens of the sequence are cached."""
        return len(self._caches.get(sequence, ()))

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        self._reserved[sequence] = tokens
        if tokens < self.cached(sequence):
            del self._caches[sequence][tokens:]

    def release(self, sequence: SequenceId) -> None:
        for of_sequences in (self._reserved, self._caches, self._spans):
            of_sequences.pop(sequence, None)

    async def close(self) -> None:
        self.closed = True
        self._caches.clear()
        self._reserved.clear()

    def roll_back(self, sequence: SequenceId, start: int, room: int, span: Span) -> list[State]:
        """The cache of a sequence through ``span``, cut to ``start`` tokens; ``room`` tokens are reserved."""
        assert self._spans.setdefault(sequence, span) == span, "a sequence changed its span"
        cache = self._caches.setdefault(sequence, [])
        assert start <= len(cache), f"position {start} is ahead of {len(cache)} cached tokens"
        assert room <= self._reserved.get(sequence, 0), f"cache for {room} tokens was not reserved"
        del cache[start:]
        return cache

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        assert not self.computing, "reorder was called while a step computes"
        assert len(sequences) == len(sources), "reorder has not one source for each sequence"
        caches = [self._caches.get(sequences[source]) for source in sources]
        spans = [self._spans.get(sequences[source]) for source in sources]
        for sequence, cache, span in zip(sequences, caches, spans, strict=True):
            self._caches.pop(sequence, None)
            self._spans.pop(sequence, None)
            if cache is not None and span is not None:
                room = self._reserved.get(sequence, 0)
                self._caches[sequence], self._spans[sequence] = cache[:room], span

    async def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        if source not in self._caches or target not in self._reserved:
            raise SessionLostError(f"sequence {source} has no cache, or {target} no reservation")
        if not 0 < tokens <= self.cached(source) or target in self._caches:
            raise InvalidStepError(
                f"{tokens} tokens of {self.cached(source)} cannot begin a sequence of {self.cached(target)}"
            )
        cache = self.roll_back(target, 0, tokens, self._spans[source])
        cache += self._caches[source][:tokens]

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        assert sequence not in self._busy, "a sequence was exported while it was in a batch"
        if (cache := self._caches.get(sequence)) is None:
            raise SessionLostError(f"sequence {sequence} has no cache")
        if start < 0 or count < 1 or start + count > len(cache):
            raise InvalidStepError(
                f"positions {start} to {start + count} are not in a cache of {len(cache)} tokens"
            )
        span = self._spans[sequence]
        data = self.pack_cache(cache[start : start + count], span)
        return (Tensor("states", *self.cache_layout(count, span), data),)

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
        expected = ("states", *self.cache_layout(count, span), "raw")
        layout = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
        if layout != [expected] or tensors[0].data.nbytes != tensors[0].decoded_nbytes:
            raise InvalidStepError(f"a cache of layout {layout}; expected {expected}")
        if not 0 <= start <= self.cached(sequence) or self._spans.get(sequence, span) != span:
            raise InvalidStepError(f"a cache from position {start} on does not follow on what is cached")
        cache = self.roll_back(sequence, start, start + count, span)
        cache += self.unpack_cache(tensors[0].data, span)

    # --- the span ----------------------------------------------------------------------------------------

    async def change_span(self, span: Span) -> None:
        assert not self._changing, "change_span was called while the span changes"
        if not self.model.span.covers(span):
            raise SpanError(f"blocks {span} are not in a model of {self.model.blocks} blocks")
        kept = self._loaded.overlap(span) if self._loaded else None
        for left in self._spans.values():
            inside = kept is not None and kept.covers(left)
            assert inside, f"blocks {left} leave while a sequence passes through them"
        for begun in self.passes:
            assert isinstance(begun, FakeForward | FakeBackward)
            left = begun.batch.span
            inside = kept is not None and kept.covers(left)
            assert inside, f"blocks {left} leave while a pass goes through them"
        self._changing = True
        self._hold(kept or span, loaded=kept is not None)
        try:
            await self.spend_loading(len(span) - len(kept or ()))
            self._hold(span)
        finally:
            self._changing = False

    def _hold(self, span: Span, *, loaded: bool = True) -> None:
        self.span, self._loaded = span, span if loaded else None
        self.cache_bytes_per_token = self._cache_bytes * len(span)


@attrs.frozen
class Unit:
    """Whole sequences of a batch, numbers ``first`` to ``end``, through one block."""

    block: int
    first: int
    end: int
    last: bool
    """Whether it is the last of the batch."""


class _Units:
    """What of a batch comes next: as many whole sequences as fit, through one block after another."""

    def __init__(self, batch: TrainingBatch, *, backward: bool) -> None:
        self.lengths = batch.lengths
        self._blocks = list(range(batch.span.start, batch.span.end))
        if not backward:
            self._blocks.reverse()
        self._first = 0

    def next(self, max_tokens: int) -> Unit:
        first, lengths = self._first, self.lengths
        end, tokens = first + 1, lengths[first]
        while end < len(lengths) and tokens + lengths[end] <= max_tokens:
            tokens, end = tokens + lengths[end], end + 1
        block, self._first = self._blocks[-1], end
        if end == len(lengths):
            self._first = 0
            self._blocks.pop()
        return Unit(block, first, end, not self._blocks)


class _FakePass(TrainingPass):
    """What both directions have in common."""

    forwards = 1.0
    """What a unit takes, in forward passes of the same rows."""

    def __init__(self, executor: FakeExecutor[State], batch: TrainingBatch, *, backward: bool) -> None:
        self.batch = batch
        self.through = False
        self.closed = False
        self._executor = executor
        self._units = _Units(batch, backward=backward)

    async def advance(self, max_tokens: int) -> bool:
        assert not self.through and not self.closed, "a pass that is over was advanced"
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._advance(max_tokens)
        except BaseException:
            self.close()
            raise
        finally:
            self.seconds += loop.time() - began
        return self.through

    async def _advance(self, max_tokens: int) -> None:
        unit = self._units.next(max_tokens)
        await self._executor.run_unit(self.batch.lengths[unit.first : unit.end], self.forwards)
        self.run(unit)
        self.through = unit.last

    @abstractmethod
    def run(self, unit: Unit) -> None:
        """Compute a unit; with the last one, the results."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._executor.passes.remove(self)


class FakeForward(_FakePass, ForwardPass):
    """A unit is as many whole sequences as fit, through one block."""

    def __init__(self, executor: FakeExecutor[State], batch: TrainingBatch, keep: bool) -> None:
        super().__init__(executor, batch, backward=False)
        self.keep = keep
        """Whether activations are kept."""

    def forget(self) -> None:
        self.keep, self.kept_bytes = False, 0

    def close(self) -> None:
        super().close()
        self.kept_bytes = 0


class FakeBackward(_FakePass, BackwardPass):
    """First the forward units again, unless they were kept; then the same backwards."""

    def __init__(self, executor: FakeExecutor[State], batch: TrainingBatch, forward: FakeForward) -> None:
        super().__init__(executor, batch, backward=True)
        self._forward = forward

    async def _advance(self, max_tokens: int) -> None:
        if self._forward.through:
            await super()._advance(max_tokens)
        else:
            await self._forward.advance(max_tokens)
            self.token_bytes = self._forward.token_bytes

    def close(self) -> None:
        self._forward.close()
        super().close()


def _check_step(batch: Sequence[ScheduledChunk], loaded: Span) -> set[SequenceId]:
    """The sequences of a batch that keeps to the rules."""
    assert batch, "step was called without a chunk"
    spans = {chunk.span for chunk in batch}
    assert len(spans) == 1, f"one batch has chunks of several spans: {spans}"
    span = spans.pop()
    assert loaded.covers(span), f"blocks {span} are not all of {loaded}"
    segments = [segment for chunk in batch for segment in chunk.segments]
    sequences = {segment.sequence for segment in segments}
    assert len(sequences) == len(segments), "a sequence is twice in one batch"
    assert all(segment.count > 0 for segment in segments), "a segment is empty"
    return sequences

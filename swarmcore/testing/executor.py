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
from collections.abc import Sequence

from swarmcore.errors import InvalidStepError, SwarmError
from swarmcore.executor.base import ScheduledChunk, SequenceId, TrainingBatch
from swarmcore.testing.fake_executor import FakeExecutor, FakeForward
from swarmcore.testing.forward_backward import (
    CountingAdapter,
    CountingBackward,
    CountingForward,
    counting_adapter,
)
from swarmcore.testing.rows import Rows as Rows
from swarmcore.testing.rows import hidden_states as hidden_states
from swarmcore.testing.rows import read_rows as read_rows
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import Tensor

COUNTING_MODEL = ModelInfo("counting", "counting-1", blocks=12, hidden_size=4)


class CountingExecutor(FakeExecutor[Rows]):
    """Computes at once, on the event loop, with plain floats: keep the sizes tiny.

    It checks what its caller owes every executor, as `FakeExecutor` says, and that cache is reserved in whole
    pages and fits. ``tokens`` is the cache it has, through the span that it begins with.
    """

    def __init__(
        self, span: Span | None = None, *, model: ModelInfo = COUNTING_MODEL, page: int = 4, tokens: int = 0
    ) -> None:
        super().__init__(model, span or model.span, page=page, cache_bytes=8 * model.hidden_size)
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
        """Tokens of each chunk of the last batches."""
        self.pass_gate: asyncio.Event | None = None
        """When set, each unit of a pass waits for this event before it computes."""
        self.pass_failures: deque[Exception] = deque()
        """Raised by the next units, one each."""
        self.pass_seconds = 0.0
        """Loop time that each token of a unit takes."""
        self.units: deque[tuple[str, int]] = deque(maxlen=1000)
        """Kind and tokens of the last batches and units, in their order: ``"step"``, ``"unit"``."""
        self._tokens, self._blocks = tokens, len(self.span)

    @property
    def reserved_tokens(self) -> int:
        """Tokens reserved for all sequences."""
        return sum(self._reserved.values())

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        assert tokens % self.page == 0, f"{tokens} tokens were reserved, not whole pages of {self.page}"
        super().reserve(sequence, tokens)
        self._check_room()

    def roll_back(self, sequence: SequenceId, start: int, room: int, span: Span) -> list[Rows]:
        cache = super().roll_back(sequence, start, room, span)
        self._check_room()
        return cache

    def _check_room(self) -> None:
        """A sequence counts for the share of the blocks that it passes through, once that is known."""
        shares = ((n, len(self._spans.get(sequence, ()))) for sequence, n in self._reserved.items())
        used = sum(tokens * blocks for tokens, blocks in shares) / self._blocks
        assert not self._tokens or used <= self._tokens, (
            f"{used} tokens are reserved; there is room for {self._tokens}"
        )

    # --- gates, delays and failures ----------------------------------------------------------------------

    async def spend_step(self, batch: Sequence[ScheduledChunk]) -> None:
        tokens = sum(chunk.tokens for chunk in batch)
        self.batches.append(tuple(chunk.tokens for chunk in batch))
        self.units.append(("step", tokens))
        await _spend(self.gate, self.step_seconds * tokens, self.failures)

    async def spend_unit(self, lengths: Sequence[int], forwards: float) -> None:
        tokens = sum(lengths)
        self.units.append(("unit", tokens))
        await _spend(self.pass_gate, self.pass_seconds * tokens, self.pass_failures)

    async def spend_loading(self, blocks: int) -> None:
        await _spend(self.loading, 0.0, self.load_failures)

    # --- the arithmetic ----------------------------------------------------------------------------------

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> CountingAdapter:
        return CountingAdapter(tensors, scaling, self.model.hidden_size)

    def begin_forward(self, batch: TrainingBatch, keep: bool) -> CountingForward:
        return CountingForward(self, batch, keep)

    def begin_backward(
        self, batch: TrainingBatch, gradients: Tensor, forward: FakeForward, *, inputs: bool, weights: bool
    ) -> CountingBackward:
        assert isinstance(forward, CountingForward)
        return CountingBackward(self, batch, gradients, forward, inputs=inputs, weights=weights)

    def cache_layout(self, count: int, span: Span) -> tuple[str, tuple[int, ...]]:
        return "uint8", (count, len(span), self.model.hidden_size, 8)

    def pack_cache(self, states: Sequence[Rows], span: Span) -> memoryview:
        values = [x for token in states for block in token for x in block]
        return memoryview(struct.pack(f"<{len(values)}d", *values))

    def unpack_cache(self, data: memoryview, span: Span) -> list[Rows]:
        values, width, blocks = (
            struct.unpack(f"<{data.nbytes // 8}d", data),
            self.model.hidden_size,
            len(span),
        )
        rows = [list(values[at : at + width]) for at in range(0, len(values), width)]
        return [rows[at : at + blocks] for at in range(0, len(rows), blocks)]

    def run_chunk(self, chunk: ScheduledChunk) -> Tensor | SwarmError:
        try:
            rows = read_rows(chunk.hidden)[chunk.first_row : chunk.first_row + chunk.tokens]
        except SwarmError as exc:
            return exc
        assert len(rows) == chunk.tokens, "the chunk reaches past its hidden states"
        prefix = chunk.adapter.prefix_tokens if chunk.adapter else 0
        answer: Rows = []
        for segment in chunk.segments:
            start, count = segment.start, segment.count
            cache = self.roll_back(segment.sequence, start, prefix + start + count, chunk.span)
            taken, rows = rows[:count], rows[count:]
            if not all(math.isfinite(value) for row in taken for value in row):
                return InvalidStepError(f"hidden states from position {start} on are not finite")
            outputs = [self._token(cache, row, chunk) for row in taken]
            answer += outputs if chunk.reply == "all" else outputs[-1:]
        return hidden_states(answer).encode(chunk.codec)

    def _token(self, cache: list[Rows], row: list[float], chunk: ScheduledChunk) -> list[float]:
        adapter = counting_adapter(chunk.adapter)
        before = cache[-1] if cache else [[0.0] * len(row) for _ in range(len(chunk.span))]
        position, states = len(cache), []
        for block, state in enumerate(before, chunk.span.start):
            if adapter is not None:
                row = [x + y for x, y in zip(row, adapter.change(block, row), strict=True)]
            # Tripling, modulo 1, keeps every earlier token in the low digits instead of fading it out.
            offset = 0.37 * (block + 1) + 0.11 * position
            state = [math.fmod(3 * s + x + offset, 1.0) for s, x in zip(state, row, strict=True)]
            states.append(state)
            row = list(array("f", state))
        cache.append(states)
        return row


async def _spend(gate: asyncio.Event | None, seconds: float, failures: deque[Exception]) -> None:
    if gate is not None:
        await gate.wait()
    if seconds:
        await asyncio.sleep(seconds)
    if failures:
        raise failures.popleft()

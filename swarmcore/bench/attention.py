"""What attention by products brings to the steps of a torch executor, beside the fused kernel alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from unittest.mock import patch

import attrs
import torch
from rich.table import Table

from swarmcore.checkpoint import open_checkpoint
from swarmcore.errors import SwarmError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch import attention_products
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_wire

CASES = ((1, 64, 1), (1, 512, 1), (1, 2000, 1), (1, 8000, 1), (16, 64, 1), (16, 1000, 1), (1, 0, 2048))
"""Sequences, the cached tokens of each, and its new ones."""
CHUNK = 512
"""Rows of a batch."""


@attrs.frozen
class AttentionResult:
    """CPU seconds of all blocks of a model, the median of the rounds."""

    sequences: int
    cached: int
    new: int
    fused: float
    """With the fused kernel wherever it can be had."""
    seconds: float
    """As steps are computed."""
    ratio: float
    """Of the one to the other; the median of the rounds."""


class _Steps:
    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        self._next = 0

    async def sequences(self, many: int, cached: int) -> list[SequenceId]:
        """That have so many tokens, each in memory of its own."""
        ids = [SequenceId(self._next + number) for number in range(many)]
        self._next += many
        if cached:
            await self.step(ids[:1], 0, cached)
            tensors = await self.executor.export_cache(ids[0], 0, cached)
            for sequence in ids[1:]:
                self.executor.reserve(sequence, cached)
                await self.executor.import_cache(sequence, self.executor.span, 0, cached, tensors)
        return ids

    async def step(self, sequences: Sequence[SequenceId], start: int, count: int) -> float:
        """CPU seconds of so many tokens of each, in batches of `CHUNK` rows."""
        seconds = 0.0
        for at in range(start, start + count, CHUNK):
            rows = min(CHUNK, start + count - at)
            hidden = torch.randn(rows, self.executor.model.hidden_size, dtype=torch.bfloat16)
            batch = []
            for sequence in sequences:
                self.executor.reserve(sequence, at + rows)
                segments = (Segment(sequence, at, rows),)
                batch.append(ScheduledChunk(to_wire("hidden", hidden), 0, self.executor.span, segments))
            began = time.process_time()
            for result in await self.executor.step(batch):
                if isinstance(result, SwarmError):
                    raise result
            seconds += time.process_time() - began
        return seconds


async def compare(
    model: str,
    *,
    cache_dtype: str = "auto",
    rounds: int = 7,
    cases: Sequence[tuple[int, int, int]] = CASES,
) -> list[AttentionResult]:
    """Steps of all blocks of ``model``, in bfloat16 and one thread, in turn with and without products."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    executor = TorchExecutor.load(
        checkpoint, checkpoint.info.span, dtype="bfloat16", cache_dtype=cache_dtype, threads=1
    )
    steps, results = _Steps(executor), []
    for many, cached, new in cases:
        ids = await steps.sequences(many, cached)
        fused: list[float] = []
        chosen: list[float] = []
        for turn in range(rounds + 1):
            # The first round warms everything up, and does not count. Who begins takes turns.
            for products in (turn % 2 == 0, turn % 2 == 1):
                with ExitStack() as stack:
                    if not products:
                        for name in ("_WORTHWHILE", "_WORTHWHILE_ALONE"):
                            stack.enter_context(patch.object(attention_products, name, math.inf))
                    seconds = await steps.step(ids, cached, new)
                if turn:
                    (chosen if products else fused).append(seconds)
        ratio = statistics.median(one / other for one, other in zip(fused, chosen, strict=True))
        results.append(
            AttentionResult(many, cached, new, statistics.median(fused), statistics.median(chosen), ratio)
        )
        for sequence in ids:
            executor.release(sequence)
    await executor.close()
    return results


def attention_table(results: Sequence[AttentionResult]) -> Table:
    """The figures as people read them."""
    table = Table("sequences", "cached", "new", "fused, ms", "as computed, ms", "ratio")
    for each in results:
        counts = map(str, (each.sequences, each.cached, each.new))
        table.add_row(*counts, f"{each.fused * 1e3:.1f}", f"{each.seconds * 1e3:.1f}", f"{each.ratio:.2f}")
    return table

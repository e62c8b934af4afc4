"""A cache that is rebuilt at once from what came token by token is the same cache, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_random_model, tiny_config

from swarmcore.checkpoint import open_checkpoint
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

PROMPT, TOKENS = 50, 110
"""More than a page of the cache, many sliding windows, and more rows than are stacked."""


async def run(executor: TorchExecutor, sequence: int, start: int, hidden: torch.Tensor) -> torch.Tensor:
    executor.reserve(SequenceId(sequence), start + len(hidden))
    segment = Segment(SequenceId(sequence), start, len(hidden))
    part = ScheduledChunk(to_wire("hidden", hidden.clone()), 0, executor.span, (segment,))
    [result] = await executor.step([part])
    assert isinstance(result, Tensor), result
    return to_torch(result)


async def cached(executor: TorchExecutor, sequence: int, count: int) -> list[torch.Tensor]:
    return [to_torch(each) for each in await executor.export_cache(SequenceId(sequence), 0, count)]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_replayed_cache_equals_one_built_token_by_token(family: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    executor = TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(2, 5), dtype="float32", threads=1)
    count = min(TOKENS, executor.max_positions or TOKENS) - 1
    hidden = torch.randn(count + 1, 64, generator=torch.Generator().manual_seed(3))
    first = [await run(executor, 0, 0, hidden[:PROMPT])]
    first += [await run(executor, 0, at, hidden[at : at + 1]) for at in range(PROMPT, count)]
    at_once = [await run(executor, 1, 0, hidden[:count])]
    cut = [
        await run(executor, 2, start, hidden[start : min(start + 37, count)]) for start in range(0, count, 37)
    ]
    then = [await run(executor, sequence, count, hidden[count:]) for sequence in range(3)]
    built = await cached(executor, 0, count)
    for sequence, outputs in ((1, at_once), (2, cut)):
        close(torch.cat(outputs), torch.cat(first))
        close(then[sequence], then[0])
        for rebuilt, original in zip(await cached(executor, sequence, count), built, strict=True):
            close(rebuilt, original)
    await executor.close()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=0)

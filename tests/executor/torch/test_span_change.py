"""Spans that change while they are served: pieces equal the whole, and what leaves is really gone."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_random_model, tiny_config

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.errors import CheckpointError, InternalError, SpanError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Progress, Span
from swarmcore.wire.tensors import Tensor

FAMILIES = (
    "gemma3",
    "qwen2-sliding",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "gpt2-by-index",
    "bloom",
    "falcon-rw",
    "falcon-40b",
)
"""Sliding and full attention mixed, dense and expert layers, traits by index, attention of their own."""


def load(checkpoint: Checkpoint, span: Span, dtype: str = "float32") -> TorchExecutor:
    return TorchExecutor.load(checkpoint, span, dtype=dtype, threads=1)


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))


async def run(
    executor: TorchExecutor, sequence: int, start: int, hidden: torch.Tensor, span: Span | None = None
) -> torch.Tensor:
    executor.reserve(SequenceId(sequence), start + len(hidden))
    segment = Segment(SequenceId(sequence), start, len(hidden))
    part = ScheduledChunk(to_wire("hidden", hidden.clone()), 0, span or executor.span, (segment,))
    [result] = await executor.step([part])
    assert isinstance(result, Tensor), result
    return to_torch(result)


def blocks(executor: TorchExecutor) -> dict[int, Any]:
    """The modules that hold the blocks, by number."""
    found: dict[int, Any] = {}
    assert executor._loaded is not None
    for model in executor._loaded.models:
        base = model._base
        layers = next(child for child in base.children() if isinstance(child, torch.nn.ModuleList))
        found |= dict(enumerate(layers, model.span.start))
    return found


class Gate(Checkpoint):
    """A checkpoint whose reading waits for the test."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner, self.name, self.folder = inner, inner.name, inner.folder
        self.config, self.info = inner.config, inner.info
        self.opened = threading.Event()
        self.opened.set()
        self.reads: list[Collection[str]] = []
        self.error: Exception | None = None

    def names(self) -> Collection[str]:
        return self.inner.names()

    def nbytes(self, names: Collection[str]) -> int:
        return self.inner.nbytes(names)

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        self.reads.append(names)
        while not self.opened.wait(0.01):
            if progress is not None:
                progress("reading", 0, 1)
        if self.error is not None:
            raise self.error
        return self.inner.read(names, progress=progress)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in FAMILIES]
    + [(family, "bfloat16") for family in ("gemma3", "deepseek_v3", "gpt_oss", "falcon-rw")],
)
async def test_pieces_give_exactly_what_the_whole_gives(family: str, dtype: str, tmp_path: Path) -> None:
    save_random_model(tiny_config(family), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    end = checkpoint.info.blocks
    whole, pieces = load(checkpoint, Span(0, end), dtype), load(checkpoint, Span(2, 3), dtype)
    hidden = rows(24)
    stays = Span(2, 3)
    kept = [await run(pieces, 5, 0, hidden[:9], stays)]
    for number, span in enumerate((Span(1, 4), Span(2, 4), Span(0, 4), Span(0, end))):
        await pieces.change_span(span)
        # A sequence of a block that stays, whose layer is another one in each span.
        kept.append(await run(pieces, 5, 9 + number, hidden[9 + number : 10 + number], stays))
    assert pieces._loaded is not None and len(pieces._loaded.models) > 2
    for executor, sequence in ((whole, 0), (pieces, 0)):
        executor.reserve(SequenceId(sequence), 24)
    for start, stop in ((0, 13), (13, 14), (14, 23), (10, 12), (12, 13)):
        outputs = [await run(executor, 0, start, hidden[start:stop]) for executor in (whole, pieces)]
        assert torch.equal(*outputs), (start, stop)
    alone = [await run(whole, 5, 0, hidden[:9], stays)]
    alone += [await run(whole, 5, 9 + n, hidden[9 + n : 10 + n], stays) for n in range(4)]
    assert torch.equal(torch.cat(kept), torch.cat(alone))
    for executor in (whole, pieces):
        await executor.close()


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon-rw", "gemma3", "qwen3_moe", "gpt2"])
async def test_blocks_that_leave_are_freed_and_others_are_not_loaded_again(
    family: str, tmp_path: Path
) -> None:
    save_random_model(tiny_config(family), tmp_path)
    checkpoint = Gate(open_checkpoint(str(tmp_path)))
    executor = load(checkpoint, Span(0, 4))
    await run(executor, 0, 0, rows(3), Span(1, 3))
    await run(executor, 1, 0, rows(3), Span(2, 4))
    executor.release(SequenceId(0))
    gc.collect()
    gc.disable()  # what is freed is freed at once, not by the next collection
    try:
        before = blocks(executor)
        leaving = [weakref.ref(before[index]) for index in (0, 1)]
        leaving += [weakref.ref(parameter) for index in (0, 1) for parameter in before[index].parameters()]
        staying = {index: id(before[index]) for index in (2, 3)}
        del before
        checkpoint.opened.clear()
        changing = asyncio.create_task(executor.change_span(Span(2, 5)))
        while len(checkpoint.reads) < 2:
            await asyncio.sleep(0.001)
        # Before anything new is read.
        assert [each for each in leaving if each() is not None] == []
        assert executor.span == Span(2, 4)
        await run(executor, 1, 3, rows(1), Span(2, 4))
        checkpoint.opened.set()
        await changing
    finally:
        gc.enable()
    assert {index: id(module) for index, module in blocks(executor).items() if index < 4} == staying
    assert all(".4." in name for name in checkpoint.reads[1])
    await executor.close()


async def test_figures_follow_the_span(tiny_llama: Checkpoint) -> None:
    executor = load(tiny_llama, Span(0, 4))
    four = executor.cache_bytes_per_token
    await executor.change_span(Span(3, 5))
    assert executor.cache_bytes_per_token == four // 2
    assert repr(executor).endswith("3:5 float32 on cpu · 0 sequences>")
    await executor.close()


async def test_a_load_that_fails_leaves_what_stays_and_can_be_mended(tiny_llama: Checkpoint) -> None:
    checkpoint = Gate(tiny_llama)
    executor, whole = load(checkpoint, Span(1, 3)), load(tiny_llama, Span(0, 3))
    checkpoint.error = CheckpointError("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        await executor.change_span(Span(2, 5))
    assert executor.span == Span(2, 3)
    await run(executor, 0, 0, rows(2), Span(2, 3))
    with pytest.raises(CheckpointError):
        await executor.change_span(Span(0, 1))
    # Nothing is left; a step is refused, and all blocks have to be read again.
    executor.reserve(SequenceId(1), 64)
    part = ScheduledChunk(to_wire("hidden", rows(1)), 0, Span(0, 1), (Segment(SequenceId(1), 0, 1),))
    [refused] = await executor.step([part])
    assert isinstance(refused, SpanError) and "none as yet" in refused.message
    checkpoint.error = None
    await executor.change_span(Span(0, 3))
    assert torch.equal(await run(executor, 2, 0, rows(4)), await run(whole, 2, 0, rows(4)))
    for each in (executor, whole):
        await each.close()


async def test_a_change_that_is_cancelled_ends_reading_and_another_may_follow(tiny_llama: Checkpoint) -> None:
    checkpoint = Gate(tiny_llama)
    executor = load(checkpoint, Span(0, 2))
    checkpoint.opened.clear()
    changing = asyncio.create_task(executor.change_span(Span(1, 4)))
    while len(checkpoint.reads) < 2:
        await asyncio.sleep(0.001)
    with pytest.raises(InternalError, match="being changed already"):
        await executor.change_span(Span(0, 2))
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert executor.span == Span(1, 2)
    # The first read ends by itself, or this one would never get the loading thread.
    following = asyncio.create_task(executor.change_span(Span(1, 3)))
    while len(checkpoint.reads) < 3:
        await asyncio.sleep(0.001)
    checkpoint.opened.set()
    await following
    assert executor.span == Span(1, 3)
    await executor.close()


async def test_a_change_that_is_cancelled_at_once_is_not_half_forgotten(tiny_llama: Checkpoint) -> None:
    executor, whole = load(tiny_llama, Span(0, 4)), load(tiny_llama, Span(0, 4))
    changing = asyncio.create_task(executor.change_span(Span(2, 5)))
    await asyncio.sleep(0)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    await executor.change_span(Span(0, 4))
    assert executor.span == Span(0, 4)
    assert torch.equal(await run(executor, 0, 0, rows(4)), await run(whole, 0, 0, rows(4)))
    for each in (executor, whole):
        await each.close()


async def test_closing_ends_a_change(tiny_llama: Checkpoint) -> None:
    checkpoint = Gate(tiny_llama)
    executor = load(checkpoint, Span(0, 2))
    checkpoint.opened.clear()
    changing = asyncio.create_task(executor.change_span(Span(1, 4)))
    while len(checkpoint.reads) < 2:
        await asyncio.sleep(0.001)
    await executor.close()
    with pytest.raises(InternalError, match="given up"):
        await changing
    with pytest.raises(InternalError, match="closed"):
        await executor.change_span(Span(0, 2))

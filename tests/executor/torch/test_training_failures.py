"""What a pass refuses, runs out of, and leaves unharmed."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from passes_of_rows import inputs_of, through

from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import InternalError, InvalidBatchError, ServerMemoryError, SpanError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId, TrainingBatch
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.microbatch import SavedBytes
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

SPAN = Span(1, 4)
LENGTHS = (6, 5)
HIDDEN, GRADIENT = inputs_of(LENGTHS)


@pytest.fixture
async def executor(tiny_llama: Checkpoint) -> Any:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", threads=1)
    yield executor
    await executor.close()


def batch_of(hidden: torch.Tensor = HIDDEN, **others: Any) -> TrainingBatch:
    return TrainingBatch(SPAN, LENGTHS, to_wire("hidden", hidden), **others)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [False, True])
async def test_values_that_are_not_finite_are_refused(
    executor: TorchExecutor, bad: float, keep: bool
) -> None:
    poisoned = HIDDEN.clone()
    poisoned[7, 3] = bad
    with pytest.raises(InvalidBatchError, match="its inputs have values that are not finite"):
        await through(executor.forward(batch_of(poisoned), keep=keep), 6)
    kept = await through(executor.forward(batch_of(), keep=True), 6) if keep else None
    backward = executor.backward(batch_of(), to_wire("hidden", poisoned), kept=kept)
    with pytest.raises(InvalidBatchError, match="its gradients of the outputs have values"):
        await through(backward, 6)
    with pytest.raises(InternalError, match="the pass is over"):
        await backward.advance(6)


async def test_an_overflow_in_the_blocks_is_told(tiny_llama: Checkpoint) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float16", threads=1)
    with pytest.raises(InvalidBatchError, match=r"not finite in torch\.float16"):
        await through(executor.forward(batch_of(HIDDEN * 1e5)), 100)
    await executor.close()


async def test_what_does_not_fit_is_refused_at_once(executor: TorchExecutor) -> None:
    wire = to_wire("hidden", HIDDEN)
    wrong = [
        TrainingBatch(SPAN, (), wire),
        TrainingBatch(SPAN, (11, 0), wire),
        TrainingBatch(SPAN, (6, 6), wire),
        TrainingBatch(SPAN, LENGTHS, to_wire("hidden", HIDDEN[:, :32])),
        TrainingBatch(SPAN, LENGTHS, Tensor("hidden", "int8", (11, 64), memoryview(bytes(11 * 64)))),
    ]
    for batch in wrong:
        with pytest.raises(InvalidBatchError):
            executor.forward(batch)
        with pytest.raises(InvalidBatchError):
            executor.backward(batch, wire)
    with pytest.raises(InvalidBatchError, match="gradients of the outputs"):
        executor.backward(batch_of(), to_wire("hidden", GRADIENT[:10]))
    with pytest.raises(InvalidBatchError, match="no adapter"):
        executor.backward(batch_of(), wire, weights=True)
    with pytest.raises(SpanError):
        executor.forward(TrainingBatch(Span(0, 2), LENGTHS, wire))


async def test_blocks_that_left_in_the_middle(executor: TorchExecutor) -> None:
    forward = executor.forward(batch_of())
    assert not await forward.advance(1)
    await executor.change_span(Span(2, 4))
    with pytest.raises(SpanError):
        await forward.advance(1)


async def test_no_memory_ends_the_pass_and_nothing_else(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(start: int, rows: torch.Tensor) -> ScheduledChunk:
        executor.reserve(SequenceId(0), start + len(rows))
        return ScheduledChunk(to_wire("hidden", rows), 0, SPAN, (Segment(SequenceId(0), start, len(rows)),))

    [before] = await executor.step([step(0, HIDDEN[:6])])
    forward = executor.forward(batch_of(), keep=True)
    assert not await forward.advance(11)
    original = LoadedBlocks.forward

    def huge(self: LoadedBlocks, *args: Any) -> torch.Tensor:
        original(self, *args)
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(LoadedBlocks, "forward", huge)
    with pytest.raises(ServerMemoryError, match="smaller micro-batches"):
        await forward.advance(11)
    monkeypatch.undo()
    assert forward._current is None and not forward._kept
    # The session goes on, and so does the next pass.
    assert isinstance(before, Tensor)
    [after] = await executor.step([step(6, HIDDEN[6:])])
    assert isinstance(after, Tensor)
    whole = executor.forward(TrainingBatch(SPAN, (11,), to_wire("hidden", HIDDEN)))
    await through(whole, 11)
    stepped = torch.cat([to_torch(before), to_torch(after)])
    torch.testing.assert_close(stepped, to_torch(whole.outputs), atol=1e-4, rtol=0)


async def test_memory_is_given_back_when_a_pass_is_closed(executor: TorchExecutor) -> None:
    forward = await through(executor.forward(batch_of(), keep=True), 4)
    # Inputs, queries, keys and values at least, of three blocks; not the weights.
    assert 3 * 11 * 64 * 4 * 4 < forward.kept_bytes < 3 * 11 * 64 * 4 * 40
    results = forward.outputs
    forward.close()
    forward.close()
    await executor.encode(results, "raw+zstd")  # through the compute thread, after what it has to do
    assert not forward._kept
    assert to_torch(forward.outputs).isfinite().all()
    with pytest.raises(InternalError, match="kept nothing"):
        executor.backward(batch_of(), to_wire("hidden", GRADIENT), kept=forward)


async def test_kept_activations_are_freed_without_the_garbage_collector(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[weakref.ref[torch.Tensor]] = []
    add = SavedBytes.add

    def noted(self: SavedBytes, tensor: torch.Tensor) -> None:
        if tensor.grad_fn is not None:
            saved.append(weakref.ref(tensor))
        add(self, tensor)

    monkeypatch.setattr(SavedBytes, "add", noted)
    gc.disable()
    try:
        forward = await through(executor.forward(batch_of(), keep=True), 100)
        assert saved
        forward.close()
        await executor.encode(forward.outputs, "raw+zstd")  # through the compute thread
        assert not any(each() is not None for each in saved)
    finally:
        gc.enable()


async def test_both_ways_tell_what_activations_take(executor: TorchExecutor) -> None:
    forward = await through(executor.forward(batch_of(), keep=True), 100)
    backward = await through(executor.backward(batch_of(), to_wire("hidden", GRADIENT)), 100)
    assert forward.token_bytes == forward.kept_bytes / (3 * 11)
    assert backward.token_bytes == pytest.approx(forward.token_bytes, rel=0.1)
    forward.close()
    nothing = await through(executor.forward(batch_of()), 100)
    assert nothing.token_bytes == 0


async def test_a_forward_pass_may_forget_what_it_has_kept(executor: TorchExecutor) -> None:
    plain = await through(executor.forward(batch_of()), 4)
    forward = executor.forward(batch_of(), keep=True)
    while not forward.kept_bytes:
        assert not await forward.advance(4)
    forward.forget()
    await through(forward, 4)
    assert forward.kept_bytes == 0 and not forward._kept
    assert torch.equal(to_torch(forward.outputs), to_torch(plain.outputs))
    with pytest.raises(InternalError, match="kept nothing"):
        executor.backward(batch_of(), to_wire("hidden", GRADIENT), kept=forward)


async def test_a_closed_executor_runs_no_passes(tiny_llama: Checkpoint) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", threads=1)
    forward = executor.forward(batch_of())
    await executor.close()
    with pytest.raises(InternalError, match="closed"):
        await forward.advance(100)
    forward.close()

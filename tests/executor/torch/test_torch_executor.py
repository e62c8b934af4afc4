from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

import pytest
import torch

from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import (
    InternalError,
    InvalidStepError,
    ServerMemoryError,
    SessionLostError,
    SpanError,
    SwarmError,
    UnknownCodecError,
)
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.cache_pages import PAGE
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.packed_linear import PackedLinear
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

WIDTH = 64
SPAN = Span(1, 4)


@pytest.fixture
async def executor(tiny_llama: Checkpoint) -> Any:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", threads=1)
    yield executor
    await executor.close()


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def step_of(
    executor: TorchExecutor,
    hidden: torch.Tensor | Tensor,
    *segments: tuple[int, int, int],
    first_row: int = 0,
    span: Span = SPAN,
    reply: Literal["all", "last"] = "all",
    codec: str = "raw",
) -> ScheduledChunk:
    wire = to_wire("hidden", hidden) if isinstance(hidden, torch.Tensor) else hidden
    placed = tuple(Segment(SequenceId(sequence), start, count) for sequence, start, count in segments)
    for segment in placed:
        executor.reserve(segment.sequence, segment.start + segment.count)
    return ScheduledChunk(wire, first_row, span, placed, reply, codec)


async def run(executor: TorchExecutor, *chunks: ScheduledChunk) -> list[torch.Tensor]:
    results = await executor.step(chunks)
    values = []
    for result in results:
        assert isinstance(result, Tensor), result
        values.append(to_torch(result))
    return values


async def test_one_slice_with_several_sequences_and_the_last_rows(executor: TorchExecutor) -> None:
    hidden = rows(9)
    [whole] = await run(executor, step_of(executor, hidden, (0, 0, 4), (1, 0, 5)))
    [last] = await run(executor, step_of(executor, hidden, (2, 0, 4), (3, 0, 5), reply="last"))
    assert torch.equal(last, whole[[3, 8]])


async def test_a_step_in_steps(executor: TorchExecutor) -> None:
    hidden = rows(9)
    [whole] = await run(executor, step_of(executor, hidden, (0, 0, 9)))
    for codec in ("raw", "int8"):
        wire = to_wire("hidden", hidden, codec)
        parts = [
            (await run(executor, step_of(executor, wire, (1, at, count), first_row=at)))[0]
            for at, count in ((0, 4), (4, 1), (5, 4))
        ]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5 if codec == "raw" else 0.1, rtol=0)
    assert not executor._steps.decoded


async def test_slices_of_one_sequence_in_one_batch(executor: TorchExecutor) -> None:
    hidden = rows(6)
    [whole] = await run(executor, step_of(executor, hidden, (0, 0, 6)))
    parts = await run(
        executor,
        step_of(executor, hidden[:4].clone(), (1, 0, 4)),
        step_of(executor, hidden[4:].clone(), (1, 4, 2)),
    )
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
async def test_values_that_are_not_finite_hurt_no_other_slice(executor: TorchExecutor, bad: float) -> None:
    good, poisoned = rows(3), rows(4, seed=1)
    poisoned[2, 5] = bad
    [alone] = await run(executor, step_of(executor, good, (0, 0, 3)))
    results = await executor.step(
        [step_of(executor, poisoned, (1, 0, 4)), step_of(executor, good, (2, 0, 3))]
    )
    assert isinstance(results[0], InvalidStepError) and "not finite" in results[0].message
    assert isinstance(results[1], Tensor)
    torch.testing.assert_close(to_torch(results[1]), alone)


async def test_outputs_that_overflow_are_that_slice_s_error(tiny_llama: Checkpoint) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float16")
    assert executor._loaded is not None
    for block in executor._loaded.models[0]._base.layers:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            ones = torch.ones(linear.out_features, linear.in_features, dtype=torch.float16)
            if isinstance(linear, PackedLinear):  # where the CPU multiplies in 16 bits
                linear.packed = torch.ops.mkldnn._reorder_linear_weight(ones, None)
            else:
                linear.weight.data.copy_(ones)
    loud = torch.full((1, WIDTH), 6e4)
    quiet = torch.zeros(1, WIDTH)
    results = await executor.step([step_of(executor, loud, (0, 0, 1)), step_of(executor, quiet, (1, 0, 1))])
    assert isinstance(results[0], InvalidStepError) and "bfloat16" in results[0].message
    assert isinstance(results[1], Tensor)
    await executor.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_outliers_stay_finite(tiny_llama: Checkpoint, dtype: str) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype=dtype)
    hidden = rows(70)
    hidden[:, 7] = 24_700.0
    hidden[0] *= 2
    [chunk] = await run(executor, step_of(executor, hidden, (0, 0, 70)))
    [decode] = await run(executor, step_of(executor, hidden[:1], (0, 70, 1)))
    assert chunk.isfinite().all() and decode.isfinite().all()
    await executor.close()


async def test_a_part_of_the_span(executor: TorchExecutor) -> None:
    hidden = rows(7)
    [whole] = await run(executor, step_of(executor, hidden, (0, 0, 7)))
    [first] = await run(executor, step_of(executor, hidden, (1, 0, 7), span=Span(1, 2)))
    [prefill] = await run(executor, step_of(executor, first[:6].clone(), (2, 0, 6), span=Span(2, 4)))
    [decode] = await run(executor, step_of(executor, first[6:].clone(), (2, 6, 1), span=Span(2, 4)))
    torch.testing.assert_close(torch.cat([prefill, decode]), whole)


async def test_blocks_that_are_not_held(executor: TorchExecutor) -> None:
    [outside] = await executor.step([step_of(executor, rows(1), (0, 0, 1), span=Span(0, 2))])
    assert isinstance(outside, SpanError) and "1:4" in outside.message
    await run(executor, step_of(executor, rows(1), (0, 0, 1), span=Span(1, 2)))
    [other] = await executor.step([step_of(executor, rows(1), (0, 1, 1), span=SPAN)])
    assert isinstance(other, InvalidStepError)


@pytest.mark.parametrize(
    ("hidden", "segment", "message"),
    [
        (torch.zeros(2, WIDTH + 1), (0, 0, 2), "shape"),
        (torch.zeros(2 * WIDTH), (0, 0, 2), "shape"),
        (torch.zeros(1, WIDTH), (0, 0, 2), "at least 2 tokens"),
        (torch.zeros(1, WIDTH), (0, 3, 1), "does not continue a sequence of 0 tokens"),
        (Tensor("hidden", "int32", (1, WIDTH), memoryview(bytearray(4 * WIDTH))), (0, 0, 1), "int32"),
    ],
)
async def test_steps_that_cannot_be(
    executor: TorchExecutor, hidden: torch.Tensor | Tensor, segment: tuple[int, int, int], message: str
) -> None:
    [result] = await executor.step([step_of(executor, hidden, segment)])
    assert isinstance(result, InvalidStepError) and message in result.message


async def test_encoded_results(executor: TorchExecutor) -> None:
    hidden = rows(3)
    [plain] = await run(executor, step_of(executor, hidden, (0, 0, 3)))
    [encoded] = await executor.step([step_of(executor, hidden, (1, 0, 3), codec="int8")])
    assert isinstance(encoded, Tensor) and encoded.codec == "int8"
    assert await executor.encode(to_wire("hidden", plain), "int8") == encoded
    [unknown] = await executor.step([step_of(executor, hidden, (2, 0, 3), codec="int3")])
    assert isinstance(unknown, UnknownCodecError)


async def test_other_dtypes_come_in(executor: TorchExecutor) -> None:
    hidden = rows(3).bfloat16()
    [expected] = await run(executor, step_of(executor, hidden.float(), (0, 0, 3)))
    [result] = await run(executor, step_of(executor, hidden, (1, 0, 3)))
    assert result.dtype == torch.float32 and torch.equal(result, expected)


async def test_caches_follow_reservations(executor: TorchExecutor) -> None:
    await run(executor, step_of(executor, rows(100), (0, 0, 100)))
    cache = executor._sequences._sequences[SequenceId(0)].cache
    assert cache is not None and cache.capacity == 128
    executor.reserve(SequenceId(0), 64)
    await run(executor, step_of(executor, rows(1), (1, 0, 1)))
    assert cache.capacity == 64
    executor.release(SequenceId(0))
    executor.release(SequenceId(7))
    released = ScheduledChunk(to_wire("hidden", rows(1)), 0, SPAN, (Segment(SequenceId(0), 0, 1),))
    [result] = await executor.step([released])
    assert isinstance(result, SessionLostError)


async def test_computes_in_a_thread_of_its_own(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = executor._step

    def noting(batch: Any) -> list[Tensor | SwarmError]:
        seen.append(threading.current_thread().name)
        return original(batch)

    monkeypatch.setattr(executor, "_step", noting)
    await run(executor, step_of(executor, rows(1), (0, 0, 1)))
    assert seen[0].startswith("swarmcore-compute")


async def test_close_is_final(tiny_llama: Checkpoint) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN)
    await asyncio.gather(executor.close(), executor.close())
    await executor.close()
    assert "closed" in repr(executor)
    with pytest.raises(InternalError, match="closed"):
        await executor.step([])
    with pytest.raises(InternalError, match="closed"):
        await executor.encode(to_wire("hidden", rows(1)), "int8")
    executor.reserve(SequenceId(0), 64)
    executor.release(SequenceId(0))


async def test_length_dependent_rope_is_refused_past_its_length(tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from swarmcore.checkpoint import open_checkpoint

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    executor = TorchExecutor.load(open_checkpoint(str(tmp_path)), Span(0, 2), dtype="float32")
    assert executor.max_positions == 16
    await run(executor, step_of(executor, rows(16), (0, 0, 16), span=Span(0, 2)))
    [result] = await executor.step([step_of(executor, rows(1), (0, 16, 1), span=Span(0, 2))])
    assert isinstance(result, InvalidStepError) and "16 tokens" in result.message
    await executor.close()


async def test_sequences_that_go_on_from_one_cache_share_its_pages(executor: TorchExecutor) -> None:
    def pages() -> float:
        return executor.cache_bytes_held / (PAGE * executor.cache_bytes_per_token)

    for sequence in range(4):
        await run(executor, step_of(executor, rows(70, seed=sequence), (sequence, 0, 70)))
    assert pages() == 8
    ids = [SequenceId(sequence) for sequence in range(4)]
    await executor.reorder(ids, [2, 1, 1, 0])
    assert pages() == 6
    # Each of the two that share copies the page that it writes, and no other.
    for sequence in range(4):
        await run(executor, step_of(executor, rows(1), (sequence, 70, 1)))
    assert pages() == 8
    # A shrunk reservation holds for what moves in.
    executor.reserve(SequenceId(3), 64)
    await executor.reorder(ids, [3, 2, 1, 0])
    with pytest.raises(InvalidStepError):
        await executor.export_cache(SequenceId(3), 64, 1)
    # One page is held by two sequences, each of which has another of its own; and one by each of the others.
    assert pages() == 5
    with pytest.raises(SessionLostError):
        await executor.reorder([*ids, SequenceId(9)], [0, 1, 2, 3, 4])


async def test_caches_move_between_executors_that_keep_them_alike(
    executor: TorchExecutor, tiny_llama: Checkpoint
) -> None:
    quantised = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", cache_dtype="int8", threads=1)
    assert (executor.numerics.cache_dtype, quantised.numerics.cache_dtype) == ("f32", "int8")
    exported = []
    for each in (executor, quantised):
        await run(each, step_of(each, rows(70), (0, 0, 70)))
        exported.append(await each.export_cache(SequenceId(0), 0, 70))
        each.reserve(SequenceId(1), 128)
    plain, small = (sum(tensor.data.nbytes for tensor in tensors) for tensors in exported)
    assert small < 0.4 * plain
    for target, tensors in ((executor, exported[1]), (quantised, exported[0])):
        with pytest.raises(InvalidStepError, match=r"'int8'.* here need|here need .*'int8'"):
            await target.import_cache(SequenceId(1), SPAN, 0, 70, tensors)
    # Nobody's values may spoil what shares a product with them.
    for target, tensors in ((executor, exported[0]), (quantised, exported[1])):
        values = to_torch(tensors[-1]).clone()
        values[0, 0, 3] = torch.nan
        with pytest.raises(InvalidStepError, match="not finite"):
            await target.import_cache(
                SequenceId(1), SPAN, 0, 70, (*tensors[:-1], to_wire(tensors[-1].name, values))
            )
        await target.import_cache(SequenceId(1), SPAN, 0, 70, tensors)
        [first] = await run(target, step_of(target, rows(1), (0, 70, 1)))
        [second] = await run(target, step_of(target, rows(1), (1, 70, 1)))
        assert torch.equal(first, second)
    await quantised.close()


async def test_few_tokens_and_many_are_computed_with_their_own_numbers_of_threads(
    tiny_llama: Checkpoint,
) -> None:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float32")
    threads: list[int] = []
    run_steps = executor._steps.run

    def spy(*args: Any) -> Any:
        threads.append(torch.get_num_threads())
        return run_steps(*args)

    executor._steps.run = spy  # type: ignore[method-assign]
    try:
        assert executor.thread_choices[:1] in ((), (torch.get_num_threads(),))
        executor.use_threads(1, 2)
        await run(executor, step_of(executor, rows(64), (0, 0, 64)))
        await run(executor, step_of(executor, rows(1), (0, 64, 1)))
        await run(executor, step_of(executor, rows(64), (0, 65, 64)))
        assert threads == [2, 1, 2]
    finally:
        await executor.close()


async def test_a_given_number_of_threads_leaves_no_choice(executor: TorchExecutor) -> None:
    assert executor.thread_choices == ()


async def test_a_step_without_memory_is_told_as_that(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(executor._steps, "run", no_memory)
    with pytest.raises(ServerMemoryError, match="ran out of memory in a step"):
        await executor.step([step_of(executor, rows(3), (0, 0, 3))])
    monkeypatch.setattr(executor._sequences, "reorder", no_memory)
    with pytest.raises(ServerMemoryError, match="ran out of memory in a reordering"):
        await executor.reorder([SequenceId(0), SequenceId(1)], [1, 0])
    monkeypatch.undo()
    [output] = await run(executor, step_of(executor, rows(3), (0, 0, 3)))
    assert output.shape == (3, WIDTH)

"""Sessions with different adapters, and without, in one ragged batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes_of_rows import inputs_of, through

from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import AdapterError, InvalidStepError, SwarmError
from swarmcore.executor.base import Adapter, ScheduledChunk, Segment, SequenceId, TrainingBatch
from swarmcore.executor.torch import lora
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

SPAN = Span(1, 4)
SIZES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32), "mlp.down_proj": (96, 64)}
PREFIX = 4


@pytest.fixture
async def executor(tiny_llama: Checkpoint) -> Any:
    executor = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", threads=1)
    yield executor
    await executor.close()


def updates(seed: int, rank: int, modules: list[str], blocks: range = range(1, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for block in blocks:
        for module in modules:
            inside, outside = SIZES[module]
            a = torch.randn(rank, inside, generator=generator) * 0.2
            b = torch.randn(outside, rank, generator=generator) * 0.2
            tensors.append(to_wire(f"{block}.{module}.lora_A", a))
            tensors.append(to_wire(f"{block}.{module}.lora_B", b))
    return tensors


def prefixes(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        to_wire(f"{block}.prefix", torch.randn(2, PREFIX, 2, 16, generator=generator))
        for block in range(1, 4)
    ]


async def some_adapters(executor: TorchExecutor) -> list[Adapter | None]:
    """Of all kinds: other ranks, projections and blocks; with a prefix, without; and none."""
    every = list(SIZES)
    return [
        await executor.load_adapter(updates(1, 3, every), 0.5),
        None,
        await executor.load_adapter(updates(2, 8, every[1:]), 2.0),
        await executor.load_adapter(updates(3, 1, every[:1], range(2, 3)), 1.0),
        await executor.load_adapter([*updates(4, 2, every), *prefixes(4)], 1.0),
        await executor.load_adapter(prefixes(5), 1.0),
    ]


def part(
    executor: TorchExecutor, sequence: int, adapter: Adapter | None, start: int, rows: torch.Tensor
) -> ScheduledChunk:
    before = 0 if adapter is None else adapter.prefix_tokens
    executor.reserve(SequenceId(sequence), before + start + len(rows))
    segment = Segment(SequenceId(sequence), start, len(rows))
    return ScheduledChunk(to_wire("hidden", rows.clone()), 0, SPAN, (segment,), adapter=adapter)


async def run(executor: TorchExecutor, *parts: ScheduledChunk) -> list[torch.Tensor]:
    results = await executor.step(parts)
    errors = [result for result in results if isinstance(result, SwarmError)]
    assert not errors
    return [to_torch(result) for result in results if isinstance(result, Tensor)]


async def whole(executor: TorchExecutor, adapter: Adapter | None, hidden: torch.Tensor) -> torch.Tensor:
    """One sequence in a forward pass, with which `test_adapters_in_passes` is content."""
    batch = TrainingBatch(SPAN, (len(hidden),), to_wire("hidden", hidden), adapter)
    return to_torch((await through(executor.forward(batch), 1000)).outputs)


@pytest.mark.parametrize("sliced_rows", [1, 4, 1000])
async def test_each_session_gets_its_own_result(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch, sliced_rows: int
) -> None:
    monkeypatch.setattr(lora, "_SLICED_ROWS", sliced_rows)
    adapters = await some_adapters(executor)
    hidden = inputs_of((12,))[0]
    expected = [await whole(executor, adapter, hidden) for adapter in adapters]
    assert min((expected[1] - other).abs().max() for n, other in enumerate(expected) if n != 1) > 0.01
    got: list[list[torch.Tensor]] = [[] for _ in adapters]
    # A long prefill beside a short one and then single tokens; each step in another order.
    for start, end in ((0, 7), (7, 8), (8, 11), (11, 12)):
        order = sorted(range(len(adapters)), key=lambda n: (n * 7 + start) % 5)
        parts = [part(executor, n, adapters[n], start, hidden[start:end]) for n in order]
        for n, rows in zip(order, await run(executor, *parts), strict=True):
            got[n].append(rows)
    for rows, alone in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), alone, atol=1e-4, rtol=0)


async def test_bfloat16_is_close(tiny_llama: Checkpoint, executor: TorchExecutor) -> None:
    half = TorchExecutor.load(tiny_llama, SPAN, dtype="bfloat16", threads=1)
    hidden = inputs_of((12,))[0]
    exact, rounded = await some_adapters(executor), await some_adapters(half)
    for start, end in ((0, 10), (10, 12)):
        expected, got = [
            await run(on, *(part(on, n, each, start, hidden[start:end]) for n, each in enumerate(adapters)))
            for on, adapters in ((executor, exact), (half, rounded))
        ]
        for rows, others in zip(got, expected, strict=True):
            assert (rows.float() - others).norm() < 0.05 * others.norm()
    await half.close()


async def test_a_batch_of_some_of_the_adapters_of_another(executor: TorchExecutor) -> None:
    adapters = (await some_adapters(executor))[:4]
    hidden = inputs_of((3,))[0]
    expected = [await whole(executor, adapter, hidden) for adapter in adapters]
    for number, chosen in enumerate([(0, 2, 3), (2, 0), (3,), (1, 3), (0, 1, 2, 3)]):
        parts = [part(executor, 10 * number + n, adapters[n], 0, hidden) for n in chosen]
        for n, rows in zip(chosen, await run(executor, *parts), strict=True):
            torch.testing.assert_close(rows, expected[n], atol=1e-4, rtol=0)


async def test_huge_weights_hurt_only_their_session(executor: TorchExecutor) -> None:
    huge = [
        to_wire("2.mlp.down_proj.lora_A", torch.full((2, 96), 1e38)),
        to_wire("2.mlp.down_proj.lora_B", torch.full((64, 2), 1e38)),
    ]
    bad = await executor.load_adapter(huge, 1.0)
    good = await executor.load_adapter(updates(1, 3, list(SIZES)), 0.5)
    hidden = inputs_of((3,))[0]
    expected = await whole(executor, good, hidden)
    parts = [part(executor, n, adapter, 0, hidden) for n, adapter in enumerate((bad, good))]
    error, result = await executor.step(parts)
    assert isinstance(error, InvalidStepError) and isinstance(result, Tensor)
    torch.testing.assert_close(to_torch(result), expected, atol=1e-4, rtol=0)


async def test_prefixes_in_caches_that_move(executor: TorchExecutor, tiny_llama: Checkpoint) -> None:
    """Rolled back, copied for beams, exported and taken in elsewhere: the prefix is always there once."""
    other = TorchExecutor.load(tiny_llama, SPAN, dtype="float32", threads=1)
    adapter, there = [await each.load_adapter(prefixes(5), 1.0) for each in (executor, other)]
    hidden = inputs_of((9,))[0]
    expected = await whole(executor, adapter, hidden)

    async def goes_on(on: TorchExecutor, sequence: int, with_: Adapter, start: int) -> None:
        [rows] = await run(on, part(on, sequence, with_, start, hidden[start:]))
        torch.testing.assert_close(rows, expected[start:], atol=1e-4, rtol=0)

    await run(executor, part(executor, 0, adapter, 0, hidden.flip(0)))
    await goes_on(executor, 0, adapter, 0)
    executor.reserve(SequenceId(1), PREFIX + 9)
    await executor.reorder([SequenceId(0), SequenceId(1)], [0, 0])
    await goes_on(executor, 1, adapter, 6)
    with pytest.raises(InvalidStepError):
        await executor.export_cache(SequenceId(0), 0, 10)
    tensors = await executor.export_cache(SequenceId(0), 0, 5)
    assert all(tensor.shape[2] == 5 for tensor in tensors)
    other.reserve(SequenceId(0), PREFIX + 9)
    await other.import_cache(SequenceId(0), SPAN, 0, 5, tensors, there)
    await goes_on(other, 0, there, 5)
    # Shrunk to nothing it still has its prefix.
    other.reserve(SequenceId(0), 0)
    await goes_on(other, 0, there, 0)
    [error] = await other.step([part(other, 0, None, 9, hidden[:1])])
    assert isinstance(error, InvalidStepError)
    await other.close()


async def test_adapters_outlive_a_change_of_the_span(executor: TorchExecutor) -> None:
    adapter = await executor.load_adapter(updates(1, 3, list(SIZES)), 0.5)
    hidden = inputs_of((5,))[0]
    expected = await whole(executor, adapter, hidden)
    for span in (Span(3, 5), Span(0, 2), SPAN):
        await executor.change_span(span)
    [rows] = await run(executor, part(executor, 0, adapter, 0, hidden))
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=0)


async def test_adapters_that_do_not_fit_are_refused(executor: TorchExecutor) -> None:
    fits = updates(1, 2, ["self_attn.q_proj"], range(1, 2))
    a, b = torch.zeros(2, 64), torch.zeros(64, 2)

    def pair(module: str, a: torch.Tensor = a, b: torch.Tensor = b) -> list[Tensor]:
        return [to_wire(f"{module}.lora_A", a), to_wire(f"{module}.lora_B", b)]

    prefix = torch.zeros(2, PREFIX, 2, 16)
    wrong: list[tuple[str, list[Tensor]]] = [
        ("no weights", []),
        ("no kind that is served", [to_wire("1.self_attn.q_proj.lora_E", a)]),
        ("two tensors named", [*fits, fits[0]]),
        ("held here are 1:4", pair("4.self_attn.q_proj")),
        ("lacks '1.self_attn.q_proj.lora_B'", fits[:1]),
        ("has the projections self_attn.q_proj", pair("1.self_attn.query")),
        ("'self_attn' is none", pair("1.self_attn")),
        ("another model", pair("1.self_attn.q_proj", a=torch.zeros(2, 63))),
        ("another model", pair("1.self_attn.q_proj", b=torch.zeros(64, 3))),
        ("another model", pair("1.self_attn.q_proj", torch.zeros(0, 64), torch.zeros(64, 0))),
        ("not finite", pair("1.self_attn.q_proj", b=b + float("nan"))),
        ("int8", [Tensor("1.prefix", "int8", (2, 4, 2, 16), memoryview(bytes(256))), *fits]),
        ("expected", [to_wire("1.prefix", prefix[:, :, :1])]),
        ("same tokens", [to_wire("1.prefix", prefix), to_wire("2.prefix", prefix[:, :3])]),
    ]
    for message, tensors in wrong:
        with pytest.raises(AdapterError, match=message):
            await executor.load_adapter(tensors, 1.0)
    with pytest.raises(AdapterError, match="scaling"):
        await executor.load_adapter(fits, float("inf"))
    gap = await executor.load_adapter([to_wire("1.prefix", prefix), to_wire("3.prefix", prefix)], 1.0)
    [error] = await executor.step([part(executor, 0, gap, 0, inputs_of((2,))[0])])
    assert isinstance(error, AdapterError) and "block 2" in error.message


async def test_what_an_adapter_may_have_is_known_from_its_description(executor: TorchExecutor) -> None:
    """Whatever `load_adapter` takes is let pass; what no block has room for is refused."""
    for tensor in (*updates(1, 3, list(SIZES)), *updates(2, 64, list(SIZES)), *prefixes(3)):
        executor.check_adapter(tensor.name, tensor.dtype, tensor.shape, SPAN)
    for name, dtype, shape, message in (
        ("1.self_attn.q_proj.lora_A", "float32", (65, 64), "rank of 1 to 64"),
        ("1.self_attn.q_proj.lora_A", "float32", (0, 64), "rank of 1 to 64"),
        ("1.self_attn.q_proj.lora_A", "float32", (3, 63), "made for another model"),
        ("1.self_attn.q_proj.lora_A", "float32", (3, 64, 1), "made for another model"),
        ("1.self_attn.q_proj.lora_A", "float32", (), "made for another model"),
        ("1.self_attn.v_proj.lora_B", "float32", (64, 3), r"expected \[32, rank\]"),
        ("1.self_attn.q_proj.lora_A", "int64", (3, 64), "int64"),
        ("1.self_attn.q_proj", "float32", (3, 64), "of no kind"),
        ("1.mlp.lora_A", "float32", (3, 64), "projections"),
        ("0.self_attn.q_proj.lora_A", "float32", (3, 64), "block 0"),
        ("1.prefix", "float32", (2, 10**6, 2, 16), "1 to 4096"),
        ("1.prefix", "float32", (2, 4, 2, 17), "made for another model"),
        ("1.prefix", "float32", (3, 4, 2, 16), "made for another model"),
    ):
        with pytest.raises(AdapterError, match=message):
            executor.check_adapter(name, dtype, shape, SPAN)
    with pytest.raises(AdapterError, match="block 3"):
        executor.check_adapter("3.self_attn.q_proj.lora_A", "float32", (3, 64), Span(1, 3))

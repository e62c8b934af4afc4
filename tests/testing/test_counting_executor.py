from __future__ import annotations

import asyncio
import math
import random
import weakref
from collections.abc import Sequence

import pytest

from swarmcore.errors import AdapterError, InvalidBatchError, SpanError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId, TrainingBatch, TrainingPass
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.forward_backward import CountingAdapter
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values, tensor_of
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

WIDTH = 4
LENGTHS = (3, 1, 4)


def rows_of(seed: int, count: int = sum(LENGTHS)) -> Rows:
    rng = random.Random(seed)
    return [[rng.uniform(-1, 1) for _ in range(WIDTH)] for _ in range(count)]


def adapter_tensors(seed: int = 7, blocks: Sequence[int] = (2, 5)) -> list[Tensor]:
    rng = random.Random(seed)

    def weights(name: str, *shape: int) -> Tensor:
        return tensor_of(name, [rng.uniform(-0.5, 0.5) for _ in range(math.prod(shape))], shape)

    return [
        tensor
        for block in blocks
        for tensor in (
            weights(f"{block}.self_attn.q_proj.lora_A", 2, WIDTH),
            weights(f"{block}.self_attn.q_proj.lora_B", WIDTH, 2),
            weights(f"{block}.prefix", 2, 3, 2, WIDTH // 2),
        )
    ]


async def run(work: TrainingPass, max_tokens: int = 10_000) -> None:
    while not await work.advance(max_tokens):
        pass
    work.close()


async def forward(
    rows: Rows,
    span: str = "0:12",
    lengths: tuple[int, ...] = LENGTHS,
    adapter: CountingAdapter | None = None,
    unit: int = 10_000,
) -> Rows:
    work = CountingExecutor().forward(TrainingBatch(Span.parse(span), lengths, hidden_states(rows), adapter))
    await run(work, unit)
    return read_rows(work.outputs)


async def backward(
    rows: Rows,
    gradients: Rows,
    span: str = "0:12",
    lengths: tuple[int, ...] = LENGTHS,
    adapter: CountingAdapter | None = None,
    unit: int = 10_000,
) -> tuple[Rows, dict[str, list[float]]]:
    batch = TrainingBatch(Span.parse(span), lengths, hidden_states(rows), adapter)
    work = CountingExecutor().backward(batch, hidden_states(gradients), weights=adapter is not None)
    await run(work, unit)
    assert work.gradients is not None
    return read_rows(work.gradients), {tensor.name: read_values(tensor) for tensor in work.weights}


async def test_units_spans_and_micro_batches_make_no_difference() -> None:
    rows, gradients = rows_of(1), rows_of(2)
    whole, (back, _) = await forward(rows), await backward(rows, gradients)
    assert await forward(rows, unit=1) == whole
    assert (await backward(rows, gradients, unit=4))[0] == back
    middle = await forward(rows, "0:5")
    assert await forward(middle, "5:12") == whole
    assert (await backward(rows, (await backward(middle, gradients, "5:12"))[0], "0:5"))[0] == back
    assert await forward(rows[3:4], lengths=(1,)) == whole[3:4]
    assert (await backward(rows[4:], gradients[4:], lengths=(4,)))[0] == back[4:]


async def test_what_is_misrouted_shows() -> None:
    rows, gradients = rows_of(1), rows_of(2)
    whole = await forward(rows)
    assert await forward(await forward(await forward(rows, "0:5"), "4:8"), "8:12") != whole
    assert await forward(await forward(rows, "6:12"), "0:6") != whole
    assert (await forward([rows[1], rows[0], *rows[2:]]))[2] != whole[2]
    back, _ = await backward(rows, gradients)
    assert (await backward(rows_of(3), gradients))[0] != back
    assert (await backward(rows, rows_of(3)))[0] != back


async def test_gradients_are_those_of_the_forward_pass() -> None:
    executor = CountingExecutor()
    tensors = adapter_tensors()
    rows, gradients = rows_of(1), rows_of(2)
    back, weights = await backward(rows, gradients, adapter=await executor.load_adapter(tensors, 2.0))

    async def loss(changed: Rows, weights: Sequence[Tensor]) -> float:
        outputs = await forward(changed, adapter=await executor.load_adapter(weights, 2.0))
        pairs = zip(outputs, gradients, strict=True)
        return sum(a * b for out, grad in pairs for a, b in zip(out, grad, strict=True))

    step = 1e-2
    for row, column in ((0, 0), (3, 2), (7, 3)):
        up, down = [list(r) for r in rows], [list(r) for r in rows]
        up[row][column] += step
        down[row][column] -= step
        slope = (await loss(up, tensors) - await loss(down, tensors)) / (2 * step)
        assert back[row][column] == pytest.approx(slope, rel=2e-3, abs=2e-3)
    for number, tensor in enumerate(tensors):
        values = read_values(tensor)
        for at in (0, len(values) - 1):
            losses = []
            for sign in (1, -1):
                moved = [*values[:at], values[at] + sign * step, *values[at + 1 :]]
                changed = tensor_of(tensor.name, moved, tensor.shape)
                losses.append(await loss(rows, [*tensors[:number], changed, *tensors[number + 1 :]]))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert weights[tensor.name][at] == pytest.approx(slope, rel=5e-3, abs=5e-3)


async def test_kept_activations_make_units_fewer_and_results_the_same() -> None:
    executor = CountingExecutor()
    batch = TrainingBatch(executor.span, LENGTHS, hidden_states(rows_of(1)))
    gradients = hidden_states(rows_of(2))
    kept = executor.forward(batch, keep=True)
    while not await kept.advance(100):
        pass
    assert kept.kept_bytes == 12 * sum(LENGTHS) * WIDTH * 4
    executor.units.clear()
    work = executor.backward(batch, gradients, kept=kept)
    await run(work)
    assert len(executor.units) == 12
    assert not executor.passes and kept.kept_bytes == 0
    assert work.gradients is not None
    assert read_rows(work.gradients) == (await backward(rows_of(1), rows_of(2)))[0]


async def test_what_is_refused() -> None:
    executor = CountingExecutor(Span(0, 6))
    good = hidden_states(rows_of(1))
    with pytest.raises(SpanError):
        executor.forward(TrainingBatch(Span(4, 8), LENGTHS, good))
    with pytest.raises(InvalidBatchError, match="shape"):
        executor.forward(TrainingBatch(Span(0, 6), (3, 1), good))
    bad = rows_of(1)
    bad[5][1] = math.nan
    work = executor.forward(TrainingBatch(Span(0, 6), LENGTHS, hidden_states(bad)))
    with pytest.raises(InvalidBatchError, match="not finite"):
        await work.advance(10)
    back = executor.backward(TrainingBatch(Span(0, 6), LENGTHS, good), hidden_states(bad))
    with pytest.raises(InvalidBatchError, match="gradients"):
        await back.advance(10)
    assert not executor.passes and not executor.computing
    for tensors in (adapter_tensors()[:1], adapter_tensors()[1:2], [], [tensor_of("x", [0.0], (1,))]):
        with pytest.raises(AdapterError):
            await executor.load_adapter(tensors, 1.0)


async def test_adapters_change_steps_and_are_freed() -> None:
    executor = CountingExecutor()
    adapter = await executor.load_adapter(adapter_tensors(), 2.0)
    hidden, outputs = hidden_states(rows_of(1, 2)), []
    for number, used in enumerate((adapter, None)):
        sequence = SequenceId(number)
        executor.reserve(sequence, 8)
        part = ScheduledChunk(hidden, 0, executor.span, (Segment(sequence, 0, 2),), adapter=used)
        [output] = await executor.step([part])
        assert isinstance(output, Tensor)
        outputs.append(read_rows(output))
        executor.release(sequence)
        del part
    assert outputs[0] != outputs[1]
    gone = weakref.ref(adapter)
    del adapter, used
    assert gone() is None


@pytest.mark.virtual_time
async def test_units_take_the_time_asked_for() -> None:
    executor = CountingExecutor(Span(0, 2))
    executor.pass_seconds = 0.5
    work = executor.forward(TrainingBatch(Span(0, 2), LENGTHS, hidden_states(rows_of(1))))
    began = asyncio.get_running_loop().time()
    await run(work)
    assert asyncio.get_running_loop().time() - began == work.seconds == 2 * 0.5 * sum(LENGTHS)

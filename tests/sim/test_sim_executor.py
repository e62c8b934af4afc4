from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import InvalidBatchError, InvalidStepError, SessionLostError, SpanError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId, TrainingBatch
from swarmcore.sim.costs import BatchLoad, load_costs
from swarmcore.sim.executor import SimExecutor
from swarmcore.sim.model import SimModel, unpack_rows
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor

COSTS = load_costs("bloom-7b1-paper")
MODEL = SimModel("counted", 12)
TOKENS = [5, 9, 9, 1, 44]

pytestmark = pytest.mark.virtual_time


def executor(span: str = "0:12") -> SimExecutor:
    return SimExecutor(MODEL, Span.parse(span), COSTS)


async def run(
    on: SimExecutor, hidden: Tensor, start: int = 0, sequence: int = 0, span: str | None = None
) -> Tensor:
    count = hidden.shape[0]
    on.reserve(SequenceId(sequence), 64)
    segment = Segment(SequenceId(sequence), start, count)
    [result] = await on.step([ScheduledChunk(hidden, 0, Span.parse(span) if span else on.span, (segment,))])
    assert isinstance(result, Tensor), result
    return result


def expected(tokens: list[int]) -> list[int]:
    state, found = 0, []
    for token in tokens:
        state = MODEL.follow(state, token)
        found.append(MODEL.expected(state))
    return found


async def test_however_blocks_and_tokens_are_cut_the_outcome_is_the_same() -> None:
    whole = await run(executor(), MODEL.embed(TOKENS))
    assert list(unpack_rows(whole)[1::2]) == expected(TOKENS)
    stages = [executor("0:5"), executor("5:6"), executor("3:12")]
    for start, end in ((0, 2), (2, 5)):
        hidden = MODEL.embed(TOKENS[start:end])
        for stage, span in zip(stages, ("0:5", "5:6", "6:12"), strict=True):
            hidden = await run(stage, hidden, start, span=span)
        assert list(unpack_rows(hidden)[1::2]) == expected(TOKENS)[start:end]


async def test_rollback_forgets_and_a_stale_cache_shows() -> None:
    rolled = executor()
    await run(rolled, MODEL.embed([5, 9, 7, 7]))
    right = await run(rolled, MODEL.embed([9]), start=2)
    assert unpack_rows(right)[1] == expected([5, 9, 9])[-1]
    stale = executor()
    await run(stale, MODEL.embed([5, 8]))
    wrong = await run(stale, MODEL.embed([9]), start=2)
    assert unpack_rows(wrong)[1] != expected([5, 9, 9])[-1]


async def test_a_block_that_ran_twice_or_not_at_all_shows() -> None:
    hidden = await run(executor("0:5"), MODEL.embed([5]))
    for span in ("4:12", "6:12"):
        assert unpack_rows(await run(executor(span), hidden))[1] != expected([5])[-1]


async def test_a_gap_is_refused() -> None:
    on = executor()
    on.reserve(SequenceId(0), 64)
    [result] = await on.step([ScheduledChunk(MODEL.embed([1]), 0, on.span, (Segment(SequenceId(0), 3, 1),))])
    assert isinstance(result, InvalidStepError)


async def test_caches_move_and_are_reordered() -> None:
    old, new = executor("0:4"), executor("0:12")
    await run(old, MODEL.embed([5, 9]), sequence=0)
    await run(old, MODEL.embed([5, 1]), sequence=1)
    await old.reorder([SequenceId(0), SequenceId(1)], [1, 1])
    parts = await old.export_cache(SequenceId(0), 0, 2)
    new.reserve(SequenceId(7), 64)
    await new.import_cache(SequenceId(7), Span(0, 4), 0, 2, parts)
    hidden = await run(new, MODEL.embed([3]), start=2, sequence=7, span="0:4")
    straight = await run(executor("0:4"), MODEL.embed([5, 1, 3]), sequence=0)
    assert unpack_rows(hidden)[1] == unpack_rows(straight)[-1]
    with pytest.raises(InvalidStepError):
        await new.import_cache(SequenceId(7), Span(0, 5), 0, 2, parts)
    with pytest.raises(SessionLostError):
        await old.export_cache(SequenceId(5), 0, 1)


async def test_time_passes_as_the_costs_say() -> None:
    loop = asyncio.get_running_loop()
    on = executor("0:4")
    began = loop.time()
    await run(on, MODEL.embed([1]))
    assert loop.time() - began == pytest.approx(COSTS.costs.seconds(4, BatchLoad(decode_rows=1)))
    on.release(SequenceId(0))
    began = loop.time()
    await on.change_span(Span(2, 8))
    assert loop.time() - began == pytest.approx(4 * COSTS.load_seconds)
    assert on.span == Span(2, 8)
    with pytest.raises(SpanError):
        await on.change_span(Span(8, 13))


async def test_passes_take_the_time_of_their_rows_and_back_takes_more() -> None:
    on = executor("0:4")
    hidden = MODEL.embed(TOKENS * 4)
    batch = TrainingBatch(on.span, (5, 15), hidden)
    load = BatchLoad(prefill_rows=20, prefill_attended=10 + 105)
    forward = on.forward(batch, keep=True)
    while not await forward.advance(100):
        pass
    assert forward.seconds == pytest.approx(COSTS.costs.seconds(4, load))
    assert forward.outputs.shape == hidden.shape and forward.kept_bytes == 4 * 20 * COSTS.row_bytes
    for kept, times in ((forward, 2), (None, 3)):
        back = on.backward(batch, hidden, kept=kept)
        while not await back.advance(100):
            pass
        back.close()
        assert back.seconds == pytest.approx(times * COSTS.costs.seconds(4, load))
        assert back.gradients is not None and back.gradients.data.nbytes == hidden.data.nbytes
    assert forward.kept_bytes == 0
    with pytest.raises(SpanError):
        on.forward(TrainingBatch(Span(3, 5), (20,), hidden))
    with pytest.raises(InvalidBatchError):
        on.forward(TrainingBatch(on.span, (19,), hidden))

"""Forward and backward passes on an engine, beside sessions and beside each other."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise

import pytest
from counting_engine import expected, run, running, some_rows, submit

from swarmcore.engine.engine import Engine
from swarmcore.engine.training import TrainingLimits
from swarmcore.errors import (
    DeadlineExceededError,
    InvalidBatchError,
    RemoteFaultError,
    ServerDrainingError,
    ServerMemoryError,
    SpanError,
    TooManyCallsError,
)
from swarmcore.executor.base import TrainingBatch, TrainingPass
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.forward_backward import CountingForward
from swarmcore.testing.rows import Rows, hidden_states, read_rows
from swarmcore.types import Span

WHOLE = Span(0, 12)

pytestmark = pytest.mark.virtual_time


async def forward(
    engine: Engine,
    rows: Rows,
    lengths: Sequence[int],
    *,
    caller: str = "alice",
    span: Span = WHOLE,
    keep: str = "",
    timeout: float = 10.0,
) -> Rows:
    batch = TrainingBatch(span, tuple(lengths), hidden_states(rows))
    with engine.training.admit(caller, span, batch.lengths, timeout) as request:
        outputs, _, _ = await request.forward(batch, keep=keep)
        return read_rows(outputs)


async def backward(
    engine: Engine,
    rows: Rows,
    gradients: Rows,
    lengths: Sequence[int],
    *,
    caller: str = "alice",
    kept: str = "",
    timeout: float = 10.0,
) -> tuple[Rows, bool]:
    """The gradients, and whether kept activations were used."""
    batch = TrainingBatch(WHOLE, tuple(lengths), hidden_states(rows))
    with engine.training.admit(caller, WHOLE, batch.lengths, timeout) as request:
        reused = request.reuse(kept, batch)
        done = await request.backward(batch, hidden_states(gradients))
        assert done.gradients is not None
        return read_rows(done.gradients), reused


async def alone(rows: Rows, gradients: Rows, lengths: tuple[int, ...]) -> tuple[Rows, Rows]:
    """What a forward and a backward pass give on an executor of their own."""
    batch = TrainingBatch(WHOLE, lengths, hidden_states(rows))
    executor = CountingExecutor()
    there, back = executor.forward(batch), executor.backward(batch, hidden_states(gradients))
    work: TrainingPass
    for work in (there, back):
        while not await work.advance(10**6):
            pass
    assert back.gradients is not None
    return read_rows(there.outputs), read_rows(back.gradients)


async def test_passes_and_sessions_each_get_their_own_results() -> None:
    async with running() as (engine, executor):
        await engine.open("a", 1, 0, timeout=1.0)
        mine, yours, up = some_rows(8, seed=1), some_rows(8, seed=2), some_rows(8, seed=3)
        there, back, other, steps = await asyncio.gather(
            forward(engine, mine, (3, 5)),
            backward(engine, mine, up, (3, 5), caller="bob"),
            forward(engine, yours, (8,), caller="bob"),
            run(engine, "a", 0, some_rows(4)),
        )
        assert (there, back[0]) == await alone(mine, up, (3, 5))
        assert other == (await alone(yours, up, (8,)))[0]
        assert steps == await expected(some_rows(4))
        assert (engine.stats.forwards, engine.stats.backwards, engine.stats.pass_tokens) == (2, 1, 24)
        assert not executor.passes and engine.training.queue.admitted_tokens == 0


@pytest.mark.parametrize(("sessions", "callers", "passes"), [(1, 1, 1), (1, 4, 6), (3, 4, 6)])
async def test_waiting_steps_go_before_units_and_at_most_one_unit_goes_between(
    sessions: int, callers: int, passes: int
) -> None:
    """However many passes wait, of however many callers, a step waits for one unit of one sequence."""
    async with running() as (engine, executor):
        executor.pass_seconds = 0.01

        async def generate(session: str) -> None:
            await engine.open(session, 1, 0, timeout=1.0)
            rows = some_rows(20)
            for position in range(20):
                await submit(engine, session, position, rows[position : position + 1])

        async def train(caller: str) -> None:
            rows, lengths = some_rows(40), (10,) * 4
            await forward(engine, rows, lengths, caller=caller, timeout=1000.0)
            await backward(engine, rows, rows, lengths, caller=caller, timeout=1000.0)

        training = [
            asyncio.create_task(train(f"caller {number}")) for number in range(callers) for _ in range(passes)
        ]
        await asyncio.gather(*(generate(f"session {number}") for number in range(sessions)))
        units = list(executor.units)
        kinds = [kind for kind, _ in units]
        first, last = kinds.index("step"), len(kinds) - kinds[::-1].index("step")
        between = units[first:last]
        assert sum(tokens for kind, tokens in between if kind == "step") == 20 * sessions
        assert all(pair != ("unit", "unit") for pair in pairwise(kinds[first:last]))
        assert {tokens for kind, tokens in between if kind == "unit"} == {10}  # nor are passes starved
        await asyncio.gather(*training)


async def test_units_are_whole_batches_when_nobody_is_interactive_and_small_when_somebody_is() -> None:
    async with running() as (engine, executor):
        executor.pass_seconds = 0.001
        await forward(engine, some_rows(40), (10,) * 4)
        assert {tokens for _, tokens in executor.units} == {40}
        await engine.open("a", 1, 0, timeout=1.0)
        await run(engine, "a", 0, some_rows(1))
        executor.units.clear()
        await forward(engine, some_rows(40), (10,) * 4)
        assert {tokens for _, tokens in executor.units} == {10}
        await asyncio.sleep(3)
        executor.units.clear()
        await forward(engine, some_rows(40), (10,) * 4)
        assert {tokens for _, tokens in executor.units} == {40}


async def test_callers_share_by_work_and_not_by_how_much_they_send() -> None:
    async with running() as (engine, executor):
        executor.pass_seconds = 0.01
        loop = asyncio.get_running_loop()
        ended: dict[str, list[float]] = {"many": [], "few": []}

        async def one(caller: str, tokens: int) -> None:
            await forward(engine, some_rows(tokens), (tokens,), caller=caller, timeout=1000.0)
            ended[caller].append(loop.time())

        began = loop.time()
        crowd = [asyncio.create_task(one("many", 20)) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.gather(*(one("few", 10) for _ in range(2)))
        alone = 2 * 12 * 10 * 0.01
        # Half of the executor, and a unit of the other's that was under way.
        assert ended["few"][-1] - began <= 2 * alone + 20 * 0.01 + 1e-6
        await asyncio.gather(*crowd)
        assert loop.time() - began == pytest.approx((10 * 20 + 2 * 10) * 12 * 0.01)


async def test_few_are_begun_at_once() -> None:
    async with running(training_limits=TrainingLimits(max_under_way=2)) as (engine, executor):
        executor.pass_seconds = 0.01
        tasks = [
            asyncio.create_task(forward(engine, some_rows(4), (4,), caller=str(number)))
            for number in range(6)
        ]
        most = 0
        while not all(task.done() for task in tasks):
            most = max(most, engine.training.queue.under_way)
            await asyncio.sleep(0.01)
        assert most == 2
        assert {tuple(map(tuple, task.result())) for task in tasks} == {
            tuple(map(tuple, (await alone(some_rows(4), some_rows(4), (4,)))[0]))
        }


async def test_the_queue_is_bounded_for_all_and_for_each() -> None:
    limits = TrainingLimits(max_tokens=10, queue_factor=4)
    async with running(training_limits=limits) as (engine, _):
        passes = engine.training
        with pytest.raises(InvalidBatchError, match="runs 10 at most") as refusal:
            passes.admit("a", WHOLE, (6, 5), 1.0)
        assert refusal.value.pass_tokens == 10
        for lengths in ((), (3, 0)):
            with pytest.raises(InvalidBatchError):
                passes.admit("a", WHOLE, lengths, 1.0)
        with pytest.raises(SpanError):
            passes.admit("a", Span(5, 13), (5,), 1.0)
        with ExitStack() as requests:
            for some in ((10,), (5, 5)):
                requests.enter_context(passes.admit("a", WHOLE, some, 1.0))
            with pytest.raises(TooManyCallsError, match="one caller"):
                passes.admit("a", WHOLE, (1,), 1.0)
            for caller in "bc":
                requests.enter_context(passes.admit(caller, WHOLE, (10,), 1.0))
            with pytest.raises(TooManyCallsError, match="try again later"):
                passes.admit("d", WHOLE, (1,), 1.0)
        assert passes.queue.admitted_tokens == 0
        passes.admit("a", WHOLE, (10,), 1.0)
        assert engine.stats.passes_refused == 6


async def test_kept_activations_spare_work_and_change_nothing() -> None:
    async with running() as (engine, executor):
        rows, up = some_rows(8, seed=1), some_rows(8, seed=2)
        _, back = await alone(rows, up, (3, 5))
        await forward(engine, rows, (3, 5), keep="k")
        assert len(executor.passes) == 1
        executor.units.clear()
        assert await backward(engine, rows, up, (3, 5), kept="k") == (back, True)
        assert len(executor.units) == 12 and not executor.passes
        assert await backward(engine, rows, up, (3, 5), kept="k") == (back, False)
        await forward(engine, rows, (3, 5), keep="k")
        # Neither another caller's, nor another batch's.
        assert await backward(engine, rows, up, (3, 5), kept="k", caller="mallory") == (back, False)
        assert (await backward(engine, rows, up, (4, 4), kept="k"))[1] is False
        assert (engine.stats.kept_hits, engine.stats.kept_misses) == (1, 3)
        assert len(executor.passes) == 1
        await asyncio.sleep(engine.training.limits.activation_ttl)
        assert not executor.passes


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (12 * 8 * 16 - 1, 0), (5 * 12 * 4 * 16, 2)])
async def test_activations_stay_within_their_budget(budget: int, kept: int) -> None:
    async with running(training_limits=TrainingLimits(activation_budget=budget)) as (engine, executor):
        rows, up = some_rows(8), some_rows(8)
        for name in "abc":
            await forward(engine, rows, (4, 4), keep=name)
        assert len(engine.training.activations) == len(executor.passes) == kept
        assert engine.training.activations.nbytes <= budget
        found = [(await backward(engine, rows, up, (4, 4), kept=name))[1] for name in "abc"]
        assert found == [False] * (3 - kept) + [True] * kept


async def test_passes_under_way_take_turns_for_memory() -> None:
    """Two backward passes of one sequence each do not fit at once, and what is kept makes room."""
    one = 12 * 8 * 16
    limits = TrainingLimits(activation_budget=one + one // 2)
    async with running(training_limits=limits) as (engine, executor):
        rows, up = some_rows(8), some_rows(8)
        right = await alone(rows, up, (8,))
        await backward(engine, rows, up, (8,))  # to learn what passes take
        await forward(engine, rows, (8,), keep="k")
        executor.pass_seconds = 0.001
        work = asyncio.gather(*(backward(engine, rows, up, (8,), caller=caller) for caller in "abc"))
        most = 0
        while not work.done():
            most = max(most, engine.training.under_way_bytes + engine.training.activations.nbytes)
            assert engine.training.queue.under_way <= 1
            await asyncio.sleep(0.004)
        assert one <= most <= limits.activation_budget
        assert [gradients for gradients, _ in await work] == [right[1]] * 3
        assert not len(engine.training.activations)


async def test_forward_passes_that_turn_out_too_large_keep_nothing() -> None:
    """At first nobody knows what they take."""
    budget = 12 * 10 * 16
    async with running(training_limits=TrainingLimits(activation_budget=budget)) as (engine, executor):
        executor.pass_seconds = 0.001
        rows = some_rows(12)
        work = asyncio.gather(*(forward(engine, rows, (4,) * 3, keep=name, caller=name) for name in "abc"))
        while not work.done():
            kept = sum(each.kept_bytes for each in executor.passes if isinstance(each, CountingForward))
            assert kept <= budget
            await asyncio.sleep(0.001)
        assert await work == [(await alone(rows, rows, (4,) * 3))[0]] * 3
        assert not executor.passes and max(tokens for _, tokens in executor.units) == 12


async def test_a_backward_pass_above_the_budget_goes_in_parts_and_a_sequence_above_it_is_refused() -> None:
    async with running(training_limits=TrainingLimits(activation_budget=12 * 8 * 16)) as (engine, executor):
        rows, up = some_rows(24), some_rows(24)
        assert (await backward(engine, rows, up, (4,) * 6))[0] == (await alone(rows, up, (4,) * 6))[1]
        assert {tokens for _, tokens in executor.units} == {4, 8}
        with pytest.raises(ServerMemoryError, match=r"9 tokens in 12 blocks .* larger --activation-budget"):
            await backward(engine, rows, up, (9, 8, 7))
        outputs = await forward(engine, rows, (9, 8, 7), keep="k")
        assert outputs == (await alone(rows, up, (9, 8, 7)))[0] and not executor.passes


async def test_a_cancelled_pass_leaves_nothing_wherever_it_was() -> None:
    rows, up = some_rows(8), some_rows(8)
    for turns in range(1, 40):
        async with running() as (engine, executor):
            await forward(engine, rows, (3, 5), keep="k")
            executor.pass_seconds = 0.01
            work = asyncio.gather(
                backward(engine, rows, up, (3, 5), kept="k"),
                forward(engine, rows, (8,), keep="l", caller="bob"),
            )
            for _ in range(turns):
                await asyncio.sleep(0.005)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            await asyncio.sleep(1)
            assert not executor.passes and not len(engine.training.queue)
            assert engine.training.queue.admitted_tokens == 0
            assert await forward(engine, rows, (8,)) == (await alone(rows, up, (8,)))[0]


async def test_deadlines_end_what_waits_and_what_computes() -> None:
    async with running() as (engine, executor):
        executor.pass_seconds = 0.1
        first = asyncio.create_task(forward(engine, some_rows(10), (10,), timeout=5.0))
        second = asyncio.create_task(forward(engine, some_rows(10), (10,), timeout=2.0))
        with pytest.raises(DeadlineExceededError, match="smaller batches"):
            await second
        with pytest.raises(DeadlineExceededError, match=r"[1-9].* s of work done"):
            await first
        await asyncio.sleep(2)
        assert not executor.passes and engine.stats.passes_failed == 2


async def test_failures_are_the_pass_s_own() -> None:
    async with running() as (engine, executor):
        bad = some_rows(8)
        bad[3][0] = math.inf
        good = asyncio.create_task(forward(engine, some_rows(8), (8,), caller="bob"))
        with pytest.raises(InvalidBatchError, match="not finite"):
            await forward(engine, bad, (8,))
        with pytest.raises(InvalidBatchError, match="gradients"):
            await backward(engine, some_rows(8), bad, (8,))
        with pytest.raises(InvalidBatchError, match="shape"):
            await forward(engine, some_rows(8), (7,))
        for error, seen in (
            (ServerMemoryError("out of memory; smaller micro-batches may fit"), ServerMemoryError),
            (RuntimeError("boom"), RemoteFaultError),
        ):
            executor.pass_failures.append(error)
            with pytest.raises(seen):
                await backward(engine, some_rows(8), some_rows(8), (8,))
        assert await good == (await alone(some_rows(8), some_rows(8), (8,)))[0]
        assert not executor.passes
        await engine.open("a", 1, 0, timeout=1.0)
        assert await run(engine, "a", 0, some_rows(4)) == await expected(some_rows(4))


async def test_blocks_that_leave_take_their_passes_with_them() -> None:
    async with running() as (engine, executor):
        executor.pass_seconds = 0.1
        rows, stays = some_rows(4), Span(4, 12)
        await forward(engine, rows, (4,), keep="goes")
        await forward(engine, rows, (4,), span=Span(5, 9), keep="stays")
        leaving = asyncio.create_task(forward(engine, rows, (4,)))
        staying = asyncio.create_task(forward(engine, rows, (4,), span=stays))
        await asyncio.sleep(1)
        await engine.training.end(keep=stays)
        await executor.change_span(stays)
        with pytest.raises(ServerDrainingError):
            await leaving
        assert len(await staying) == 4
        assert len(engine.training.activations) == 1
        last = asyncio.create_task(forward(engine, rows, (4,), span=stays))
        draining = asyncio.create_task(engine.training.drain())
        await draining
        assert not executor.passes and len(await last) == 4


async def test_closing_ends_passes() -> None:
    async with running() as (engine, executor):
        executor.pass_seconds = 0.1
        work = asyncio.create_task(forward(engine, some_rows(4), (4,)))
        await forward(engine, some_rows(1), (1,), keep="k", caller="bob")
        await engine.close()
        with pytest.raises(ServerDrainingError):
            await work
        assert not executor.passes
        with pytest.raises(ServerDrainingError):
            await forward(engine, some_rows(4), (4,))


@pytest.mark.parametrize("seed", range(10))
async def test_whatever_happens_results_are_right_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    batches = [
        (some_rows(sum(lengths), seed=number), some_rows(sum(lengths), seed=-number - 1), lengths)
        for number, lengths in enumerate([(3, 5), (8,), (1, 1, 1), (2, 9)])
    ]
    right = [await alone(*batch) for batch in batches]
    limits = TrainingLimits(max_tokens=20, queue_factor=3, max_under_way=2, activation_budget=4000)
    async with running(training_limits=limits) as (engine, executor):
        executor.pass_seconds = 0.001

        async def client(number: int) -> int:
            done = 0
            for turn in range(12):
                which = rng.randrange(len(batches))
                rows, up, lengths = batches[which]
                caller, name = f"caller {number % 3}", f"{number} {turn}"
                timeout = rng.choice([0.05, 0.5, 5.0])
                if rng.random() < 0.1:
                    executor.pass_failures.append(ServerMemoryError("none left"))
                try:
                    async with asyncio.timeout(rng.choice([0.1, 1.0, 10.0])):
                        there = await forward(
                            engine, rows, lengths, caller=caller, keep=name, timeout=timeout
                        )
                        back, _ = await backward(
                            engine, rows, up, lengths, caller=caller, kept=name, timeout=timeout
                        )
                except (TimeoutError, DeadlineExceededError, ServerMemoryError, TooManyCallsError):
                    await asyncio.sleep(rng.random())
                else:
                    assert (there, back) == right[which]
                    done += 1
            return done

        done = await asyncio.gather(*(client(number) for number in range(6)))
        assert sum(done) > 10
        await asyncio.sleep(1)
        assert not len(engine.training.queue) and engine.training.queue.admitted_tokens == 0
        assert len(executor.passes) == len(engine.training.activations)
        assert engine.training.activations.nbytes <= limits.activation_budget

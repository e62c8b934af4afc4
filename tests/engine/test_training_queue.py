"""Whose unit is next, how large it is, and which activations stay: plain objects, without a loop's time."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest

from swarmcore.engine.activations import ActivationStore
from swarmcore.engine.training_queue import (
    ACTIVE,
    LONGEST,
    SHARE,
    QueuedPass,
    TrainingPacing,
    TrainingQueue,
)
from swarmcore.executor.base import TrainingBatch
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.forward_backward import CountingForward
from swarmcore.testing.rows import hidden_states
from swarmcore.types import Span

LENGTHS = (4, 4)
BATCH = TrainingBatch(Span(0, 12), LENGTHS, hidden_states([[0.5] * 4] * 8))


def queue(max_under_way: int = 100) -> TrainingQueue:
    return TrainingQueue(max_under_way=max_under_way, max_tokens=1000)


async def queued(caller: str) -> QueuedPass:
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    work = CountingExecutor().forward(BATCH)
    return QueuedPass(
        caller=caller, kind="forward", span=BATCH.span, lengths=LENGTHS, work=work, answer=answer
    )


async def work_off(passes: TrainingQueue, seconds: dict[str, float], units: int) -> dict[str, float]:
    """Compute so many units; how long each caller's took in all."""
    spent = dict.fromkeys(seconds, 0.0)
    for _ in range(units):
        chosen = passes.next()
        assert chosen is not None
        chosen.begun = True
        passes.charge(chosen, seconds[chosen.caller])
        spent[chosen.caller] += seconds[chosen.caller]
    return spent


async def test_time_is_shared_evenly_whatever_units_cost_and_however_many_wait() -> None:
    passes = queue()
    for caller, many in (("a", 1), ("b", 5), ("c", 50)):
        for _ in range(many):
            passes.add(await queued(caller))
    spent = await work_off(passes, {"a": 1.0, "b": 3.0, "c": 0.5}, 400)
    assert max(spent.values()) - min(spent.values()) <= 3.0


async def test_who_comes_late_does_not_catch_up_and_who_comes_back_owes_what_was_left() -> None:
    passes = queue()
    first = await queued("a")
    passes.add(first)
    await work_off(passes, {"a": 1.0}, 100)
    late = await queued("b")
    passes.add(late)
    assert (await work_off(passes, {"a": 1.0, "b": 1.0}, 20)) == {"a": 10.0, "b": 10.0}
    # A pass at a time instead of many changes nothing.
    total = {"a": 0.0, "b": 0.0}
    for _ in range(20):
        passes.remove(late)
        late = await queued("b")
        passes.add(late)
        for caller, spent in (await work_off(passes, {"a": 1.0, "b": 4.0}, 5)).items():
            total[caller] += spent
    assert abs(total["a"] - total["b"]) <= 4.0


async def test_random_passes_never_upset_the_accounts() -> None:
    rng, passes = random.Random(1), queue(max_under_way=3)
    held: list[QueuedPass] = []
    admitted: list[tuple[str, int]] = []
    for _ in range(2000):
        choice = rng.random()
        if choice < 0.4 and len(held) < 20:
            held.append(await queued(rng.choice("abcdef")))
            passes.add(held[-1])
            admitted.append((held[-1].caller, rng.randrange(1, 9)))
            passes.admit(*admitted[-1])
        elif choice < 0.6 and held:
            passes.remove(held.pop(rng.randrange(len(held))))
            passes.leave(*admitted.pop(rng.randrange(len(admitted))))
        elif (chosen := passes.next()) is not None:
            chosen.begun = True
            passes.charge(chosen, rng.random())
        assert passes.under_way <= 3 and len(passes) == len(held)
        assert passes.admitted_tokens == sum(tokens for _, tokens in admitted)
    for each in held:
        passes.remove(each)
    assert passes.next() is None


def test_units_follow_what_was_measured_and_who_is_there() -> None:
    pacing, lengths = TrainingPacing(), (10,) * 100
    assert pacing.unit_tokens("forward", lengths, 1.0, now=0.0) == 1000
    pacing.stepped(5.0)
    assert pacing.unit_tokens("forward", lengths, 1.0, now=5.0) == 1
    pacing.note_unit("forward", lengths, 1, seconds=0.1)
    assert pacing.unit_tokens("forward", lengths, 1.0, now=5.0) == int(SHARE * 100)
    pacing.note_unit("forward", lengths, 50, seconds=1.0)  # slower than was thought: at once
    assert pacing.unit_tokens("forward", lengths, 1.0, now=5.0) == int(SHARE * 50)
    for _ in range(100):
        pacing.note_unit("forward", lengths, 50, seconds=0.25)  # faster: by and by
    assert pacing.unit_tokens("forward", lengths, 1.0, now=5.0) == pytest.approx(SHARE * 200, rel=0.05)
    assert pacing.unit_tokens("backward", lengths, 1.0, now=5.0) == 1
    alone = 5.0 + ACTIVE
    assert pacing.unit_tokens("forward", (10,) * 50, 1.0, now=alone) == 500
    # 5 ms a token by now, to a hundredth
    assert pacing.unit_tokens("forward", (10,) * 1000, 1.0, now=alone) == pytest.approx(
        LONGEST * 200, rel=0.01
    )


async def test_names_are_used_again_and_batches_that_do_not_fit_are_not_kept() -> None:
    executor = CountingExecutor()

    async def through() -> CountingForward:
        work = executor.forward(BATCH, keep=True)
        while not await work.advance(100):
            pass
        return work

    size = (await through()).kept_bytes
    executor.passes.clear()
    store = ActivationStore(2 * size, ttl=10.0)
    assert store.worth_keeping(BATCH)
    assert store.keep("a", "x", BATCH, await through(), now=0.0)
    assert store.keep("a", "x", BATCH, await through(), now=1.0)
    assert (len(store), store.nbytes, len(executor.passes)) == (1, size, 1)
    store.keep("b", "x", BATCH, await through(), now=2.0)
    store.keep("b", "y", BATCH, await through(), now=3.0)
    assert store.take("a", "x", BATCH, now=4.0) is None
    assert store.next_expiry() == 12.0
    found = store.take("b", "x", BATCH, now=4.0)
    assert found is not None and store.nbytes == size
    assert store.take("b", "y", BATCH, now=13.0) is None
    exact = attrs.evolve(BATCH, reproducible=True)
    store.keep("c", "x", BATCH, await through(), now=13.0)
    assert store.take("c", "x", exact, now=13.0) is None
    store.clear()
    found.close()
    assert not executor.passes
    small = ActivationStore(size - 1)
    large = await through()
    small.learn(large)
    assert not small.keep("a", "x", BATCH, large, now=0.0)
    assert not small.worth_keeping(BATCH) and not executor.passes

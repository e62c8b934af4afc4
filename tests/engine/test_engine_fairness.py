"""Interactive steps beside a full load of training, with the times of a real model on a real machine."""

from __future__ import annotations

import asyncio
import itertools
import statistics

import pytest

from swarmcore.engine.engine import Engine
from swarmcore.executor.base import TrainingBatch
from swarmcore.sim.costs import load_costs
from swarmcore.sim.executor import SimExecutor
from swarmcore.sim.model import SimModel
from swarmcore.types import Span

COSTS = load_costs("bloom-7b1-paper")
MODEL = SimModel("shared", 10)

pytestmark = pytest.mark.virtual_time


async def decode_seconds(engine: Engine, session: str, steps: int, think: float) -> list[float]:
    """Seconds that each step takes, of a client that needs ``think`` seconds in between."""
    await engine.open(session, 1, steps, timeout=1.0)
    loop, took = asyncio.get_running_loop(), []
    for position in range(steps):
        began = loop.time()
        await engine.step(session, (position,), (1,), MODEL.embed([position]), timeout=60.0)
        took.append(loop.time() - began)
        await asyncio.sleep(think)
    return took


async def train(engine: Engine, caller: str, lengths: tuple[int, ...]) -> None:
    """Forward and backward passes without end."""
    hidden = MODEL.embed(range(sum(lengths)))
    batch = TrainingBatch(Span(0, 10), lengths, hidden)
    for number in itertools.count():
        with engine.training.admit(caller, batch.span, lengths, 1000.0) as request:
            await request.forward(batch, keep=str(number))
        with engine.training.admit(caller, batch.span, lengths, 1000.0) as request:
            request.reuse(str(number) if number % 2 else "", batch)
            await request.backward(batch, hidden)


@pytest.mark.parametrize("think", [0.0, 0.013, 0.2])
async def test_steps_take_at_most_twice_as_long_under_a_full_training_load(think: float) -> None:
    executor = SimExecutor(MODEL, Span(0, 10), COSTS)
    engine = Engine(executor, cache_tokens=4096)
    await engine.start()
    idle = await decode_seconds(engine, "idle", 100, think)
    trainers = [asyncio.create_task(train(engine, caller, (32,) * 16)) for caller in ("a", "b", "c")]
    await asyncio.sleep(1.0)
    trained, began = engine.stats.pass_seconds, asyncio.get_running_loop().time()
    busy = await decode_seconds(engine, "busy", 300, think)
    share = (engine.stats.pass_seconds - trained) / (asyncio.get_running_loop().time() - began)
    assert statistics.quantiles(busy, n=20)[-1] <= 2 * statistics.quantiles(idle, n=20)[-1]
    assert share > 0.25  # nor is the training starved
    for trainer in trainers:
        trainer.cancel()
    await asyncio.gather(*trainers, return_exceptions=True)
    await engine.close()


async def test_training_has_the_whole_machine_when_it_is_alone() -> None:
    executor = SimExecutor(MODEL, Span(0, 10), COSTS)
    engine = Engine(executor, cache_tokens=4096)
    await engine.start()
    trainers = [asyncio.create_task(train(engine, caller, (32,) * 16)) for caller in ("a", "b")]
    await asyncio.sleep(60.0)
    assert executor.busy_seconds > 59.9
    assert engine.stats.pass_units < 12 * 10 * engine.stats.backwards  # whole batches, a block at a time
    for trainer in trainers:
        trainer.cancel()
    await asyncio.gather(*trainers, return_exceptions=True)
    await engine.close()

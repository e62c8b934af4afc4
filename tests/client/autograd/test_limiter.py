"""Micro-batches of several calls under a limit."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.client.autograd.limiter import Call, FairLimiter

pytestmark = pytest.mark.virtual_time


async def run(limiter: FairLimiter, call: Call, name: str, order: list[str], seconds: float = 1.0) -> None:
    async with limiter.slot(call):
        order.append(name)
        await asyncio.sleep(seconds)


async def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    limiter, order, large, small = FairLimiter(lambda: 2), list[str](), Call(), Call()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(run(limiter, large, "large", order))
        await asyncio.sleep(2.5)
        for _ in range(3):
            tasks.create_task(run(limiter, small, "small", order))
    # Six had begun. Then the two share the slots, and take turns.
    assert order[6:12].count("small") == 3
    assert asyncio.get_running_loop().time() == 12  # no place was ever empty
    assert repr(limiter) == "<FairLimiter 0/2 under way · 0 waiting>"


async def test_the_limit_grows_with_the_slots() -> None:
    slots = 1
    limiter, order, call = FairLimiter(lambda: slots), list[str](), Call()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(run(limiter, call, "", order))
        await asyncio.sleep(0.5)
        assert len(order) == 1
        slots = 4
        await asyncio.sleep(1)
        assert len(order) == 5


@pytest.mark.parametrize("moment", [0.5, 1.0, 1.5])
async def test_whoever_is_cancelled_leaves_no_place_taken(moment: float) -> None:
    limiter, order, call = FairLimiter(lambda: 1), list[str](), Call()
    tasks = [asyncio.create_task(run(limiter, call, str(n), order)) for n in range(4)]
    await asyncio.sleep(moment)
    for task in tasks[:3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order[-1] == "3"
    assert repr(limiter) == "<FairLimiter 0/1 under way · 0 waiting>"

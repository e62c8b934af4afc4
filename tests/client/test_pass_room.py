"""Micro-batches of several calls in a room with few places."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.client.autograd.activation_memory import Call, PassRoom

pytestmark = pytest.mark.virtual_time


async def run(room: PassRoom, call: Call, name: str, order: list[str], seconds: float = 1.0) -> None:
    async with room.place(call):
        order.append(name)
        await asyncio.sleep(seconds)


async def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    room, order, large, small = PassRoom(lambda: 2), list[str](), Call(), Call()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(run(room, large, "large", order))
        await asyncio.sleep(2.5)
        for _ in range(3):
            tasks.create_task(run(room, small, "small", order))
    # Six had begun. Then the two share the places, and take turns.
    assert order[6:12].count("small") == 3
    assert asyncio.get_running_loop().time() == 12  # no place was ever empty
    assert repr(room) == "<PassRoom 0/2 under way · 0 waiting>"


async def test_room_grows_with_the_places() -> None:
    places = 1
    room, order, call = PassRoom(lambda: places), list[str](), Call()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(run(room, call, "", order))
        await asyncio.sleep(0.5)
        assert len(order) == 1
        places = 4
        await asyncio.sleep(1)
        assert len(order) == 5


@pytest.mark.parametrize("moment", [0.5, 1.0, 1.5])
async def test_whoever_is_cancelled_leaves_no_place_taken(moment: float) -> None:
    room, order, call = PassRoom(lambda: 1), list[str](), Call()
    tasks = [asyncio.create_task(run(room, call, str(n), order)) for n in range(4)]
    await asyncio.sleep(moment)
    for task in tasks[:3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order[-1] == "3"
    assert repr(room) == "<PassRoom 0/1 under way · 0 waiting>"

"""Passes on servers that are slow: progress counts, whatever its speed; what hangs is given up."""

from __future__ import annotations

import asyncio

import pytest
from chain_world import WHOLE, Work, adapter_of, world_of

from swarmcore.errors import DeadlineExceededError

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("seconds_a_token", [0.0, 0.1, 1.0, 20.0])
async def test_batches_get_through_at_any_speed(seconds_a_token: float) -> None:
    async with world_of("0:6", "6:12") as world:
        for server in world.servers.values():
            server.engine.executor.pass_seconds = seconds_a_token  # type: ignore[attr-defined]
        work = Work.of(adapter=adapter_of())
        await work.check(world.runner(timeout=60.0, patience=1.0))
        assert sum(server.passes for server in world.servers.values()) == 2 * len(work.batches), "each once"


async def test_a_server_that_hangs_is_given_up_in_time() -> None:
    async with world_of("0:12") as world:
        [server] = world.servers.values()
        server.engine.executor.pass_gate = gate = asyncio.Event()  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DeadlineExceededError):
            await world.runner(timeout=60.0, patience=1.0).forward(WHOLE, Work.of(((3, 1),)).batches)
        assert 60 <= loop.time() - began < 200
        gate.set()


async def test_what_comes_by_a_slow_link_has_time() -> None:
    """Rows that are under way for longer than the timeout in all, each piece of them in time."""
    async with world_of("0:12") as world:
        work = Work.of(((4, 4), (5,)))
        [server] = world.servers.values()
        loop = asyncio.get_running_loop()
        from swarmcore.client.autograd import rpc as passes
        from swarmcore.rpc.channel import Channel
        from swarmcore.wire.forward_backward import Rows

        send = Channel.send

        async def slowly(self: Channel, record: object, *tensors: object) -> None:
            if isinstance(record, Rows) and record.kind == "inputs":
                await asyncio.sleep(20)
            await send(self, record, *tensors)  # type: ignore[arg-type]

        began = loop.time()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Channel, "send", slowly)
            patch.setattr(passes, "PIECE_BYTES", 16)  # a row in each piece
            await world.runner(timeout=60.0, patience=1.0, in_flight=1).forward(WHOLE, work.batches)
        assert loop.time() - began > 160, "eight rows take longer than the timeout"
        assert server.passes == len(work.batches)

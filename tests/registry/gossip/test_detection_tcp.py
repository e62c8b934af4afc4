"""Real processes over TCP that die or hang: the default settings, and a ttl of five minutes."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest

import swarmcore
from swarmcore.testing.fork_server import ForkServer

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 5.0), (signal.SIGSTOP, 15.0)])
async def test_a_process_that_dies_or_hangs_leaves_the_view_of_a_client(
    fork_server: ForkServer, number: int, seconds: float
) -> None:
    async with AsyncExitStack() as stack:
        listen = ("--listen", "127.0.0.1:0")
        first = await stack.enter_async_context(await fork_server.start("bootstrap", *listen))
        others = [
            await stack.enter_async_context(
                await fork_server.start("bootstrap", *listen, "--bootstrap", first.address)
            )
            for _ in range(2)
        ]
        swarm = await stack.enter_async_context(swarmcore.connect(first.address))
        changes = swarm.registry.changes()
        async with asyncio.timeout(20.0):
            while len(swarm.view()) < 3:
                await anext(changes)
        others[0].signal(number)
        async with asyncio.timeout(seconds):
            while others[0].peer in swarm.view().servers:
                await anext(changes)
        assert {first.peer, others[1].peer} == set(swarm.view().servers)
        if number == signal.SIGSTOP:
            others[0].signal(signal.SIGCONT)
            async with asyncio.timeout(20.0):
                while others[0].peer not in swarm.view().servers:
                    await anext(changes)

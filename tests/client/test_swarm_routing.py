"""A swarm routes by what it measures and remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import attrs
import pytest

from swarmcore.client.swarm import Swarm
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.routing.costs import CostModel
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import Span

HOP_SECONDS = CostModel().hop_seconds

pytestmark = pytest.mark.virtual_time


class Servers:
    """Block servers at distances of their own, and a client."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._network = MemoryNetwork()
        self._directory = MemoryDirectory()

    async def start(self, blocks: str, rtt: float) -> BlockServer:
        identity = Identity.generate()
        transport = FaultyTransport(self._network.transport(identity), Random(0), Faults(delay=rtt))
        node = await self._stack.enter_async_context(Node(identity, [transport]))
        registry = MemoryRegistry(node.peer, self._directory)
        await registry.start()
        self._stack.push_async_callback(registry.close)
        server = BlockServer(
            ServerConfig(model="counting"),
            node,
            registry,
            CountingExecutor(Span.parse(blocks)),
            cache_tokens=400,
        )
        return await self._stack.enter_async_context(server)

    async def client(self) -> Swarm:
        identity = Identity.generate()
        node = Node(identity, [self._network.transport(identity, listen=False)])
        swarm = Swarm(node, MemoryRegistry(node.peer, self._directory), rng=Random(0))
        return await self._stack.enter_async_context(swarm)


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(stack)


async def test_the_first_session_already_takes_the_near_server() -> None:
    async with servers() as around:
        far = [await around.start("0:12", 0.2) for _ in range(4)]
        near = await around.start("0:12", 0.01)
        swarm = await around.client()
        async with await swarm.open_session(COUNTING_MODEL) as session:
            assert session.chain.peers == (near.node.peer,)
        assert set(swarm.latencies.seconds) == {server.node.peer for server in (near, *far)}
        way = swarm.route(COUNTING_MODEL, session.chain).stages[0].network
        assert way == pytest.approx(0.005 + HOP_SECONDS, abs=1e-4)


async def test_a_server_that_failed_is_avoided_until_it_starts_anew() -> None:
    async with servers() as around:
        near, far = await around.start("0:12", 0.01), await around.start("0:12", 0.1)
        swarm = await around.client()
        await (await swarm.open_session(COUNTING_MODEL)).close()
        swarm.health.failed(near.node.peer, asyncio.get_running_loop().time(), "broke off")
        assert swarm.chain(COUNTING_MODEL).peers == (far.node.peer,)
        restarted = attrs.evolve(near.info, incarnation=near.info.incarnation + 1)
        await near.registry.announce(restarted, 60)
        await asyncio.sleep(0.1)
        assert swarm.chain(COUNTING_MODEL).peers == (near.node.peer,)

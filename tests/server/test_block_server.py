"""A block server's life: it announces itself, answers for itself, and leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarmcore.client.swarm import Swarm
from swarmcore.errors import InputError, MissingBlocksError, PeerUnreachableError, SpanError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.loading import check_span
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, hidden_states
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.types import PeerId, Span
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD

pytestmark = pytest.mark.virtual_time

CACHE = 400


class Swarms:
    """Servers and clients of one in-memory network and directory."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.directory = MemoryDirectory()
        self.transports: dict[PeerId, MemoryTransport] = {}

    @asynccontextmanager
    async def server(self, blocks: str = "0:12") -> AsyncIterator[BlockServer]:
        identity = Identity.generate()
        transport = self.transports[identity.peer] = self.network.transport(identity)
        async with Node(identity, [transport]) as node:
            registry = MemoryRegistry(node.peer, self.directory)
            await registry.start()
            executor = CountingExecutor(Span.parse(blocks))
            config = ServerConfig(model="counting", public_name="test")
            async with BlockServer(config, node, registry, executor, cache_tokens=CACHE) as server:
                yield server
            await registry.close()

    def client(self) -> Swarm:
        identity = Identity.generate()
        node = Node(identity, [self.network.transport(identity, listen=False)])
        return Swarm(node, MemoryRegistry(node.peer, self.directory))


@pytest.fixture
def swarms() -> Swarms:
    return Swarms()


async def test_a_server_announces_itself_and_withdraws(swarms):
    async with swarms.client() as client:
        async with swarms.server("3:7") as server:
            [info] = client.view()
            assert info == server.info
            assert (info.state, info.span, info.model) == ("online", Span(3, 7), COUNTING_MODEL)
            assert info.cache_tokens == info.cache_tokens_free == CACHE
            assert info.addresses == tuple(map(str, server.node.addresses))
            assert info.public_name == "test"
            assert info.computes == server.executor.numerics
            assert set(info.capabilities) == {"training", "adapters"}
        assert len(client.view()) == 0
        assert server.executor.closed


async def test_a_change_of_load_is_announced_within_seconds(swarms):
    async with swarms.server() as server, swarms.client() as client:
        async with await client.open_session(COUNTING_MODEL) as session:
            await session.step(hidden_states([[0.5] * 4] * 100), [100])
            await asyncio.sleep(6)
            [info] = client.view()
            assert info.sessions == 1
            assert info.cache_tokens_free == CACHE - 100
            assert "attention cache: 25 of 100 pages are in use, 75 are free" in server.notes
        await asyncio.sleep(6)
        assert next(iter(client.view())).cache_tokens_free == CACHE
        assert "online · 0 sessions · 400 of 400" in repr(server)


async def test_other_addresses_are_announced_at_once(swarms):
    async with swarms.server() as server, swarms.client() as client:
        for place in "here", "there":
            swarms.transports[server.node.peer].move(place)
            await asyncio.sleep(0.01)
            [info] = client.view()
            assert info.addresses == (f"memory://{place}/{server.node.peer}",)
            assert (await client.info(server.node.peer)).server == info


async def test_a_server_describes_itself_when_asked(swarms):
    async with swarms.server() as server, swarms.client() as client:
        async with await client.open_session(COUNTING_MODEL) as session:
            await session.step(hidden_states([[0.5] * 4]), [1])
        await asyncio.sleep(1)
        reply = await client.info(server.node.peer)
        assert reply.server == server.info
        assert reply.uptime == pytest.approx(1, abs=0.1)
        assert reply.counters["steps"] == 1
        assert reply.counters["sessions_opened"] == 1
        pong = await client.node.call(server.node.addresses, PING_METHOD, Ping(b"hello"))
        assert pong.payload == b"hello"
        with pytest.raises(PeerUnreachableError, match="not in this swarm"):
            await client.info(PeerId("12D3KooWnobody"))


async def test_waiting_for_blocks_ends_with_the_server_that_brings_them(swarms):
    async with swarms.client() as client, swarms.server("0:6"):
        waiting = asyncio.create_task(client.wait_for_blocks(COUNTING_MODEL, timeout=60))
        await asyncio.sleep(1)
        assert not waiting.done()
        async with swarms.server("6:12"):
            assert len(await waiting) == 2


async def test_waiting_for_blocks_says_what_is_missing(swarms):
    async with swarms.client() as client, swarms.server("0:6"):
        with pytest.raises(MissingBlocksError, match="6:12"):
            await client.wait_for_blocks(COUNTING_MODEL, timeout=2)


def test_blocks_that_the_model_does_not_have_are_refused():
    check_span(Span(20, 30), 30, "m")
    with pytest.raises(SpanError, match="0:30"):
        check_span(Span(20, 31), 30, "m")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cache_tokens", 0),
        ("max_batch_tokens", 0),
        ("threads", 0),
        ("idle_timeout", 0),
        ("num_blocks", 0),
        ("throughput", 0),
        ("rebalance", -1),
        ("balance_quality", 1.5),
        ("drain", -1),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, value):
    with pytest.raises(InputError, match=setting.replace("_", "-")):
        ServerConfig(model="m", **{setting: value})


def test_a_server_that_is_told_its_blocks_stays_on_them_unless_told_otherwise():
    assert ServerConfig(model="m").rebalance_interval > 0
    assert ServerConfig(model="m", rebalance=0).rebalance_interval == 0
    assert ServerConfig(model="m", span=Span(0, 2)).rebalance_interval == 0
    assert ServerConfig(model="m", span=Span(0, 2), rebalance=60).rebalance_interval == 60

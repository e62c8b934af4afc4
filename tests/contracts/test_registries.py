"""Every registry backend keeps the registry contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from swarmcore.identity import Identity
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.testing.gossip import GossipSwarm
from swarmcore.testing.registry_contract import Member, RegistryContract, RegistrySwarm
from swarmcore.transport import Transport
from swarmcore_transports.tcp import TcpTransport


class MemorySwarm(RegistrySwarm):
    def __init__(self) -> None:
        self.directory = MemoryDirectory()
        self.members: list[Member] = []

    async def join(self, identity: Identity | None = None) -> Member:
        identity = identity or Identity.generate()
        member = Member(identity, MemoryRegistry(identity.peer, self.directory))
        await member.registry.start()
        self.members.append(member)
        return member

    async def crash(self, member: Member) -> None:
        await member.registry.close()

    async def aclose(self) -> None:
        for member in self.members:
            await member.registry.close()


def tcp_transport(identity: Identity, listen: bool) -> Transport:
    return TcpTransport(identity, listen_on=["127.0.0.1:0"] if listen else [])


@pytest.mark.virtual_time
class TestMemoryRegistry(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(MemorySwarm()) as swarm:
            yield swarm


@pytest.mark.virtual_time
class TestGossipOverMemory(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(GossipSwarm()) as swarm:
            yield swarm


class TestGossipOverTcp(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(GossipSwarm(tcp_transport, options=GossipOptions(interval=0.2))) as swarm:
            swarm.ttl, swarm.patience = 1.5, 20.0  # in real time
            yield swarm


async def test_a_client_without_an_address_follows_a_swarm_over_tcp() -> None:
    async with aclosing(GossipSwarm(tcp_transport, options=GossipOptions(interval=0.2))) as swarm:
        one, other = await swarm.join(), await swarm.join()
        for member in (one, other):
            await member.registry.announce(member.info(), 1.5)
        client = await swarm.watch(one.addresses)
        await swarm.until_known(client, one.info(), other.info())
        await swarm.crash(one)
        await swarm.until_known(client, other.info())
        await other.registry.announce(other.info(sessions=1), 1.5)
        await swarm.until_known(client, other.info(sessions=1))

"""Every registry backend keeps the registry contract."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import pytest

from swarmcore.identity import Identity
from swarmcore.registry.gossip import GossipRegistry
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc import Node
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.testing.registry_contract import Member, RegistryContract, RegistrySwarm
from swarmcore.transport import Transport
from swarmcore.types import Address
from swarmcore_transports.tcp import TcpTransport

EPOCH = 1_700_000_000.0


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


class GossipSwarm(RegistrySwarm):
    interval = 5.0

    def __init__(self) -> None:
        self.nodes: dict[Member, tuple[Node, Transport]] = {}

    @abstractmethod
    def transport(self, identity: Identity) -> Transport: ...

    def wall_clock(self) -> float:
        return EPOCH + asyncio.get_running_loop().time()

    async def join(self, identity: Identity | None = None) -> Member:
        identity = identity or Identity.generate()
        transport = self.transport(identity)
        node = Node(identity, [transport])
        await node.start()
        anyone = [Address.parse(url) for member in list(self.nodes)[-1:] for url in member.addresses]
        registry = GossipRegistry(
            node, anyone, interval=self.interval, rng=Random(len(self.nodes)), wall_clock=self.wall_clock
        )
        member = Member(identity, registry, tuple(map(str, node.addresses)))
        self.nodes[member] = node, transport
        await registry.start()
        return member

    async def crash(self, member: Member) -> None:
        node, transport = self.nodes.pop(member)
        if isinstance(transport, MemoryTransport):
            await transport.crash()
        await member.registry.close()
        await node.close()

    async def aclose(self) -> None:
        for member in self.nodes:  # all gossip ends before the first of those that are called goes away
            await member.registry.close()
        for node, _ in self.nodes.values():
            await node.close()


class GossipOverMemory(GossipSwarm):
    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork()

    def transport(self, identity: Identity) -> Transport:
        return self.network.transport(identity)


class GossipOverTcp(GossipSwarm):
    ttl = 1.5
    interval = 0.2
    patience = 20.0

    def transport(self, identity: Identity) -> Transport:
        return TcpTransport(identity, listen_on=["127.0.0.1:0"])


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
        async with aclosing(GossipOverMemory()) as swarm:
            yield swarm


class TestGossipOverTcp(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(GossipOverTcp()) as swarm:
            yield swarm

"""The registry over the DHT of libp2p: its contract, the end of half of its nodes, and lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from swarmcore.identity import Identity
from swarmcore.rpc import Node
from swarmcore.testing.registry_contract import Member, RegistryContract, RegistrySwarm
from swarmcore.types import Address

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.dht_options import DhtOptions
from swarmcore_transports.libp2p.dht_registry import DhtRegistry

QUICK = DhtOptions(refresh=2.0, reread=10.0, upkeep=1.5)


class DhtSwarm(RegistrySwarm):
    ttl, patience = 2.5, 30.0  # in real time

    def __init__(self, options: DhtOptions = QUICK) -> None:
        self.options = options
        self.members: list[Member] = []

    async def join(self, identity: Identity | None = None) -> Member:
        return await self._start(identity or Identity.generate(), ["127.0.0.1:0"])

    async def watch(self) -> Member:
        """A new client, which does not listen."""
        return await self._start(Identity.generate(), [])

    async def _start(self, identity: Identity, listen_on: list[str]) -> Member:
        bootstrap = next((member.addresses for member in reversed(self.members) if member.addresses), ())
        transport = Libp2pTransport(identity, listen_on=listen_on)
        node = Node(identity, [transport])
        await node.start()
        registry = DhtRegistry(node, transport, list(map(Address.parse, bootstrap)), options=self.options)
        member = Member(identity, registry, tuple(map(str, node.addresses)))
        self.members.append(member)
        await registry.start()
        return member

    async def crash(self, member: Member) -> None:
        assert isinstance(member.registry, DhtRegistry)
        self.members.remove(member)
        await member.registry.close()
        await member.registry.node.close()

    async def aclose(self) -> None:
        await asyncio.gather(*(self.crash(member) for member in list(self.members)))


@pytest.fixture
async def swarm() -> AsyncIterator[DhtSwarm]:
    async with aclosing(DhtSwarm()) as swarm:
        yield swarm


class TestDhtRegistry(RegistryContract):
    @pytest.fixture
    async def swarm(self) -> AsyncIterator[RegistrySwarm]:
        async with aclosing(DhtSwarm()) as swarm:
            yield swarm

"""Two swarms that begin apart become one when any member of one is introduced to one of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.members import REMEMBERED
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.rpc.node import Node
from swarmcore.testing.gossip import EPOCH, GossipSwarm
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.testing.registry_contract import Member
from swarmcore.types import Address, ServerInfo

pytestmark = pytest.mark.virtual_time

TTL = 300.0


def wall_clock() -> float:
    return EPOCH + asyncio.get_running_loop().time()


@pytest.fixture
async def swarm() -> AsyncIterator[GossipSwarm]:
    async with aclosing(GossipSwarm()) as swarm:
        yield swarm


async def of_its_own(swarm: GossipSwarm, count: int) -> list[Member]:
    """A swarm of ``count`` members that knows of no other."""
    members: list[Member] = []
    for _ in range(count):
        member = await swarm.join(bootstrap=members[0].addresses if members else ())
        await member.registry.announce(member.info(), TTL)
        members.append(member)
    for member in members:
        await swarm.until_known(member, *(other.info() for other in members))
    return members


def addresses_of(member: Member) -> list[Address]:
    return [Address.parse(url) for url in member.addresses]


@pytest.mark.parametrize("both_ways", [False, True])
async def test_two_swarms_become_one(swarm: GossipSwarm, both_ways: bool) -> None:
    one, other = await of_its_own(swarm, 8), await of_its_own(swarm, 5)
    client = await swarm.watch(bootstrap=one[3].addresses)
    assert len(client.registry.view()) == 8

    one[-1].registry.introduce(addresses_of(other[-1]))
    if both_ways:  # they found each other at the same moment
        other[-1].registry.introduce(addresses_of(one[-1]))
    await asyncio.sleep(30.0)
    for member in (*one, *other, client):
        assert len(member.registry.view()) == 13

    await other[0].registry.withdraw()
    await asyncio.sleep(30.0)
    for member in (*one, *other, client):
        assert len(member.registry.view()) == 12


async def test_a_member_is_introduced_before_it_joins(swarm: GossipSwarm) -> None:
    others = await of_its_own(swarm, 3)
    identity = Identity.generate()
    async with Node(identity, [swarm.make_transport(identity, True)]) as node:
        registry = GossipRegistry(node, wall_clock=wall_clock)
        registry.introduce([Address("memory", "//nowhere", others[1].identity.peer)])
        registry.introduce(addresses_of(others[0]))
        await registry.start()
        assert len(registry.view()) == 3
        await registry.close()


async def test_who_is_introduced_need_not_answer_yet() -> None:
    network, identity, other = MemoryNetwork(), Identity.generate(), Identity.generate()
    async with Node(identity, [network.transport(identity)]) as node:
        registry = GossipRegistry(node, wall_clock=wall_clock)
        registry.introduce([Address("memory", "//later", other.peer)])
        await registry.start()  # alone
        await asyncio.sleep(10.0)
        transport = MemoryTransport(other, network=network, listen_on=["later"])
        async with Node(other, [transport]) as late:
            its_registry = GossipRegistry(late, wall_clock=wall_clock)
            await its_registry.start()
            await its_registry.announce(ServerInfo(other.peer, tuple(map(str, late.addresses))), TTL)
            await asyncio.sleep(30.0)
            assert set(registry.view().servers) == {other.peer}
            await registry.close()
            await its_registry.close()


async def test_a_client_joins_through_whom_it_was_introduced_to(swarm: GossipSwarm) -> None:
    members = await of_its_own(swarm, 3)
    identity = Identity.generate()
    async with Node(identity, [swarm.make_transport(identity, False)]) as node:
        registry = WatchingRegistry(node, [], wall_clock=wall_clock)
        with pytest.raises(InputError, match="needs the address"):
            await registry.start()
        registry.introduce(addresses_of(members[0]))
        await registry.start()
        assert len(registry.view()) == 3
        await registry.close()


async def test_what_is_introduced_is_bounded() -> None:
    network, identity = MemoryNetwork(), Identity.generate()
    async with Node(identity, [network.transport(identity)]) as node:
        registry = GossipRegistry(node, wall_clock=wall_clock)
        for _ in range(2 * REMEMBERED):
            registry.introduce([Address("memory", "//nowhere", Identity.generate().peer)])
        assert f"{REMEMBERED} lost" in repr(registry._members)
        await registry.close()

"""Peers that are reached elsewhere than before say so at once."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.registry.lan import follow_addresses
from swarmcore.testing.gossip import GossipSwarm
from swarmcore.testing.memory import MemoryTransport
from swarmcore.types import Address, ServerInfo
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Method

pytestmark = pytest.mark.virtual_time

TTL = 300.0
PING = Method("/test/ping/1", Ping, Pong)


def move(swarm: GossipSwarm, member: int, place: str) -> None:
    transport = swarm.transports[swarm.members[member].identity.peer]
    assert isinstance(transport, MemoryTransport)
    transport.move(place)


async def test_the_node_says_when_its_addresses_change() -> None:
    swarm = GossipSwarm()
    member = await swarm.join()
    node = swarm.nodes[member.identity.peer]
    before = node.addresses
    waiting = asyncio.create_task(node.addresses_other_than(before))
    await asyncio.sleep(100.0)
    assert not waiting.done()
    move(swarm, 0, "there")
    there = (Address("memory", "//there", node.peer),)
    assert await waiting == node.addresses == there
    assert await node.addresses_other_than(before) == there  # a change before the call counts
    await swarm.aclose()


async def test_all_members_and_clients_follow_a_peer_that_moves() -> None:
    swarm = GossipSwarm()
    for _ in range(5):
        member = await swarm.join()
        await member.registry.announce(ServerInfo(member.identity.peer, member.addresses), TTL)
    client = await swarm.watch()
    mover = swarm.members[0]
    node = swarm.nodes[mover.identity.peer]

    async def answer(request: Ping, caller: object) -> Pong:
        return Pong(request.payload)

    node.serve(PING, answer)
    info = ServerInfo(node.peer, mover.addresses)
    following = asyncio.create_task(follow_addresses(node, mover.registry, info, TTL))
    await asyncio.sleep(1.0)

    move(swarm, 0, "there")
    await asyncio.sleep(10.0)  # whom the push has missed learns of it by comparing
    for member in (*swarm.members[1:], client):
        seen = member.registry.view().servers[node.peer]
        assert seen.addresses == (f"memory://there/{node.peer}",)
    addresses = [Address.parse(url) for url in seen.addresses]
    assert await swarm.nodes[client.identity.peer].call(addresses, PING, Ping(b"x")) == Pong(b"x")

    await asyncio.sleep(2 * TTL)  # refreshes, comparisons and heartbeats all find it there
    assert all(len(member.registry.view()) == 5 for member in swarm.members)
    following.cancel()
    await swarm.aclose()


async def test_a_move_while_the_first_announcement_was_made_is_not_missed() -> None:
    swarm = GossipSwarm()
    member = await swarm.join()
    node = swarm.nodes[member.identity.peer]
    move(swarm, 0, "there")
    await member.registry.announce(ServerInfo(node.peer, member.addresses), TTL)
    info = ServerInfo(node.peer, member.addresses)
    following = asyncio.create_task(follow_addresses(node, member.registry, info, TTL))
    await asyncio.sleep(0.0)
    assert member.registry.view().servers[node.peer].addresses == (f"memory://there/{node.peer}",)
    following.cancel()
    await swarm.aclose()

"""Clients that follow a swarm, on a memory network and virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import pytest

from swarmcore.errors import InputError, PeerUnreachableError, TooManyCallsError
from swarmcore.identity import Identity
from swarmcore.registry.base import Change
from swarmcore.registry.gossip import watch_server as watchers
from swarmcore.registry.gossip.messages import WATCH, RecordBatch, WatchRecords
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.store import RecordStore
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.resources import Resource, ResourceManager
from swarmcore.rpc import Channel, Node
from swarmcore.testing import MemoryNetwork
from swarmcore.testing.gossip import GossipSwarm, faulty_memory
from swarmcore.types import Address, short

pytestmark = pytest.mark.virtual_time


@pytest.fixture
async def swarm() -> AsyncIterator[GossipSwarm]:
    async with aclosing(GossipSwarm(faulty_memory(Random(1)))) as swarm:
        yield swarm


async def test_a_client_knows_everyone_once_it_has_started(swarm: GossipSwarm) -> None:
    members = await swarm.announced(5)
    client = await swarm.watch(members[2].addresses)
    assert client.knows(*(member.info() for member in members))


async def test_changes_are_pushed_to_a_client_at_once(swarm: GossipSwarm) -> None:
    one, other = await swarm.announced(2)
    client = await swarm.watch(one.addresses)
    changes = client.registry.changes()
    async with asyncio.timeout(0.1):
        await other.registry.announce(other.info(sessions=1), 30.0)
        assert await anext(changes) == Change("updated", other.info(sessions=1))
        await other.registry.withdraw()
        assert await anext(changes) == Change("left", other.info(sessions=1))


async def test_a_client_sees_the_living_for_as_long_as_they_live(swarm: GossipSwarm) -> None:
    members = await swarm.announced(3)
    client = await swarm.watch(members[0].addresses)
    changes = client.registry.changes()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(300.0):
            await anext(changes)
    await swarm.crash(members[2])
    await swarm.until_known(client, members[0].info(), members[1].info())


async def test_a_client_moves_on_when_its_member_dies_and_keeps_its_view(swarm: GossipSwarm) -> None:
    members = await swarm.announced(4)
    bootstrap, *servers = members
    client = await swarm.watch(bootstrap.addresses)
    await swarm.crash(bootstrap)
    assert client.knows(*(member.info() for member in members))
    await servers[0].registry.announce(servers[0].info(sessions=5), 30.0)
    async with asyncio.timeout(1.0):
        await swarm.until(client, lambda view: view.servers[servers[0].identity.peer].sessions == 5)
    await swarm.until_known(client, servers[0].info(sessions=5), servers[1].info(), servers[2].info())


async def test_a_client_moves_on_from_a_member_that_falls_silent(swarm: GossipSwarm) -> None:
    members = await swarm.announced(4, ttl=300.0)
    client = await swarm.watch(members[0].addresses)
    swarm.split([members[0]], [client, *members[1:]])
    await members[1].registry.announce(members[1].info(sessions=5), 300.0)
    async with asyncio.timeout(30.0):
        await swarm.until(client, lambda view: view.servers[members[1].identity.peer].sessions == 5)


async def test_a_client_moves_on_from_a_member_that_leaves(swarm: GossipSwarm) -> None:
    members = await swarm.announced(3)
    client = await swarm.watch(members[0].addresses)
    await members[0].registry.withdraw()
    await members[0].registry.close()
    await members[1].registry.announce(members[1].info(sessions=5), 30.0)
    await swarm.until_known(client, members[1].info(sessions=5), members[2].info())
    await asyncio.sleep(1.0)
    assert f"of {short(members[1].identity.peer)}" in repr(client.registry) or (
        f"of {short(members[2].identity.peer)}" in repr(client.registry)
    )


async def test_a_client_comes_back_after_its_own_network_was_away(swarm: GossipSwarm) -> None:
    members = await swarm.announced(3)
    client = await swarm.watch(members[0].addresses)
    swarm.split([client], members)
    await swarm.until_known(client)
    await asyncio.sleep(600.0)
    swarm.heal()
    swarm.patience = 150.0
    await swarm.until_known(client, *(member.info() for member in members))


async def test_start_names_what_was_tried(swarm: GossipSwarm) -> None:
    one = await swarm.join()
    await swarm.crash(one)
    with pytest.raises(PeerUnreachableError, match=one.addresses[0]):
        await swarm.watch(one.addresses)
    with pytest.raises(InputError, match="address of a member"):
        await swarm.watch([])


async def test_a_client_announces_nothing(swarm: GossipSwarm) -> None:
    (one,) = await swarm.announced(1)
    client = await swarm.watch()
    with pytest.raises(InputError):
        await client.registry.announce(client.info(), 30.0)
    await client.registry.withdraw()
    assert one.knows(one.info())


async def test_a_member_with_too_many_watchers_sends_clients_elsewhere(
    swarm: GossipSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "MAX_WATCHERS", 1)
    one, other = await swarm.announced(2)
    both = [*one.addresses, *other.addresses]
    clients = [await swarm.watch(both) for _ in range(2)]
    for client in clients:
        assert client.knows(one.info(), other.info())
    with pytest.raises(PeerUnreachableError, match="watch another one"):
        await swarm.watch(both)


async def test_one_client_has_no_more_than_its_share_of_watchers(swarm: GossipSwarm) -> None:
    (one,) = await swarm.announced(1)
    client = await swarm.watch(one.addresses)
    node, to = swarm.nodes[client.identity.peer], [Address.parse(url) for url in one.addresses]
    opening = WatchRecords(RecordStore().hashes())
    channels = [await node.open(to, WATCH, opening) for _ in range(watchers.MAX_OF_PEER - 1)]
    one_more = await node.open(to, WATCH, opening)
    with pytest.raises(TooManyCallsError, match="one peer"):
        await one_more.receive()
    for channel in channels:
        await channel.receive()
        channel.abort("enough")


async def test_a_client_that_goes_leaves_nothing_behind(swarm: GossipSwarm) -> None:
    (one,) = await swarm.announced(1)
    client = await swarm.watch()
    assert isinstance(one.registry, GossipRegistry)
    assert "1 watching" in repr(one.registry)
    await swarm.crash(client)
    await asyncio.sleep(1.0)
    assert "0 watching" in repr(one.registry)


async def test_a_member_that_tells_without_end_is_given_up() -> None:
    network = MemoryNetwork()
    identity, own = Identity.generate(), Identity.generate()

    async def endless(channel: Channel) -> None:
        while True:
            await channel.send(RecordBatch((), complete=False))

    async with (
        Node(identity, [network.transport(identity)]) as member,
        Node(own, [network.transport(own, listen=False)]) as node,
    ):
        member.serve_protocol(WATCH, endless)
        registry = WatchingRegistry(node, member.addresses, options=GossipOptions(capacity=50))
        with pytest.raises(PeerUnreachableError, match="ever more peers"):
            await registry.start()
        await registry.close()


async def test_what_a_watcher_does_not_read_is_counted_for_it(swarm: GossipSwarm) -> None:
    one, *_ = await swarm.announced(3)
    resources = swarm.nodes[one.identity.peer].resources
    before = _peak_of_bytes(resources)
    await swarm.watch(one.addresses)
    assert _peak_of_bytes(resources) > before


def _peak_of_bytes(resources: ResourceManager) -> int:
    return next(use.peak for use in resources.snapshot() if use.resource == Resource.BYTES)

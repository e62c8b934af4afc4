"""Relays of js-libp2p serve our peers, and ours serve js-libp2p."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import pytest_asyncio
from js_node import JsNode
from relayed_peers import PLACE, Peer, RelayedPeers, check_echo, check_end

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.types import Address, PeerId

STREAM = "/swarmcore/stream/1"
MIB = 2**20


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[RelayedPeers]:
    async with RelayedPeers() as peers:
        yield peers


def at(relay: str, peer: str) -> Address:
    """The address of ``peer`` at the relay with the multiaddr ``relay``."""
    return Address("libp2p", f"{relay}/p2p-circuit/p2p", PeerId(peer))


async def served_by(peers: RelayedPeers, relay: JsNode) -> tuple[Peer, Address]:
    """A peer of ours that has a reservation at ``relay``, and its address there."""
    server = await peers.listening(listen_on=[PLACE], relays=[relay.addrs[0]])
    [address] = await server.announces(len)
    assert address == at(relay.addrs[0], server.id)
    return server, address


async def test_our_peers_talk_through_a_js_relay(js_libp2p, peers: RelayedPeers):
    async with JsNode(js_libp2p, "--relay") as relay:
        _, address = await served_by(peers, relay)
        stream = await peers.client().transport.open_stream(address)
        assert stream.path == "relayed"
        await check_echo(stream, 1, 70_000, 3 * MIB)
        with pytest.raises(PeerUnreachableError, match="has no reservation"):
            await peers.client().transport.open_stream(at(relay.addrs[0], Identity.generate().peer))


async def test_a_js_relay_that_allows_few_bytes(js_libp2p, peers: RelayedPeers):
    async with JsNode(js_libp2p, "--relay", "--relay-bytes", "50000") as relay:
        _, address = await served_by(peers, relay)
        stream = await peers.client().transport.open_stream(address)
        await check_echo(stream, 10_000)
        await stream.send(bytes(100_000))
        await check_end(stream)


async def test_another_relay_is_taken_when_a_js_relay_dies(js_libp2p, peers: RelayedPeers):
    ours = await peers.relay()
    async with JsNode(js_libp2p, "--relay") as relay:
        server = await peers.listening(listen_on=[PLACE], relays=[relay.addrs[0], str(ours.addresses[0])])
        await server.announces(lambda addresses: len(addresses) == 2)
        await relay.kill()
        [address] = await server.through(ours)
        await check_echo(await peers.client().transport.open_stream(address), 1000)


async def test_a_js_node_talks_to_our_peer_through_our_relay(js_libp2p, peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    [address] = await server.through(relay)
    async with JsNode(js_libp2p) as node:
        multiaddr = f"{address.location}/{address.peer}"
        await node.ping(multiaddr)
        await node.dial(multiaddr, STREAM, [1, 70_000, 3 * MIB])


async def test_a_js_node_is_reached_through_our_relay(js_libp2p, peers: RelayedPeers):
    relay = await peers.relay()
    place = f"{relay.addresses[0].location}/{relay.id}"
    async with JsNode(js_libp2p, "--echo") as node:
        assert f"{place}/p2p-circuit/p2p/{node.id}" in await node.reserve(place)
        stream = await peers.client().transport.open_stream(at(place, node.id))
        assert stream.path == "relayed"
        await check_echo(stream, 1, 70_000, 3 * MIB)

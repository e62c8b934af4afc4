"""Our transport and js-libp2p nodes: the ping protocol and our framed streams, whoever dials."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import pytest_asyncio
from js_node import JsNode, JsNodeError
from libp2p.host.ping import PingService
from libp2p.peer.id import ID
from relayed_peers import PATIENCE, PLACE, Peer, RelayedPeers, check_echo

from swarmcore.errors import PeerIdentityError, PeerUnreachableError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.types import Address, PeerId
from swarmcore_transports.libp2p.multiaddrs import to_multiaddr

STREAM = "/swarmcore/stream/1"
MIB = 2**20
SIZES = [0, 1, 255, 70_000, 5 * MIB]


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[RelayedPeers]:
    async with RelayedPeers() as peers:
        yield peers


def address_of(node: JsNode, peer: str | None = None) -> Address:
    """Where ``node`` listens, as the address of ``peer`` if that is given."""
    location = node.addrs[0].removesuffix(f"/{node.id}")
    return Address("libp2p", location, PeerId(peer or node.id))


def multiaddr_of(peer: Peer) -> str:
    return str(to_multiaddr(peer.addresses[0]))


async def ping(peer: Peer, node: JsNode) -> float:
    """Seconds of one round trip of the ping protocol."""
    thread, host = await peer.transport.trio_side()
    address = to_multiaddr(address_of(node))

    async def once() -> list[int]:
        await host.connect(ID.from_string(node.id), address)
        return await PingService(host.libp2p).ping(ID.from_string(node.id))

    [round_trip] = await thread.call(once, timeout=PATIENCE, what="pinging")
    return round_trip / 1e3


async def test_our_peer_and_a_js_node_ping_each_other(js_libp2p: Path, peers: RelayedPeers):
    server = await peers.listening(listen_on=[PLACE])
    async with JsNode(js_libp2p) as node:
        assert await node.ping(multiaddr_of(server)) < PATIENCE
        assert await ping(peers.client(), node) < PATIENCE


async def test_a_js_node_echoes_our_messages(js_libp2p: Path, peers: RelayedPeers):
    client = peers.client().transport
    async with JsNode(js_libp2p, "--echo") as node:
        streams = [await client.open_stream(address_of(node)) for _ in range(2)]
        assert [(stream.remote, stream.path) for stream in streams] == 2 * [(node.id, "direct")]
        await asyncio.gather(*(check_echo(stream, *SIZES) for stream in streams))
        await streams[0].close()
        await check_echo(streams[1], 1)


async def test_we_echo_the_messages_of_a_js_node(js_libp2p: Path, peers: RelayedPeers):
    server = await peers.listening(listen_on=[PLACE])
    async with JsNode(js_libp2p) as node:
        await asyncio.gather(*(node.dial(multiaddr_of(server), STREAM, SIZES) for _ in range(2)))


async def test_neither_side_takes_another_peer_for_the_one_it_dials(js_libp2p: Path, peers: RelayedPeers):
    server = await peers.listening(listen_on=[PLACE])
    somebody = Identity.generate().peer
    async with JsNode(js_libp2p, "--echo") as node:
        with pytest.raises(PeerIdentityError, match=f"not the one that was dialled, but {node.id}"):
            await peers.client().transport.open_stream(address_of(node, somebody))
        with pytest.raises(JsNodeError, match=somebody):
            await node.ping(multiaddr_of(server).replace(server.id, somebody))


async def test_a_js_node_that_does_not_speak_our_protocol(js_libp2p: Path, peers: RelayedPeers):
    async with JsNode(js_libp2p) as node:
        with pytest.raises(ProtocolError, match="does not speak"):
            await peers.client().transport.open_stream(address_of(node))
        await node.kill()
        with pytest.raises(PeerUnreachableError, match="refused"):
            await peers.client().transport.open_stream(address_of(node))

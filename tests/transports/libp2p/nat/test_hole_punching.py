"""Direct connections beside relayed ones, on loopback; tests/netlab has real routers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.dcutr import PROTOCOL_ID as DCUTR
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr
from relayed_peers import PATIENCE, PLACE, Peer, RelayedPeers, check_echo

from swarmcore_transports.libp2p.host import is_direct
from swarmcore_transports.libp2p.nat.hole_punching import MAX_ADDRESSES, HolePuncher, _usable_addresses

EVERYWHERE = frozenset(["public", "lan", "loopback"])


async def puncher(peer: Peer) -> HolePuncher:
    await peer.transport.trio_side()
    return peer.transport._services.hole_puncher


async def everywhere(*peers: Peer) -> None:
    """Let addresses of loopback count as those of the Internet do."""
    for peer in peers:
        (await puncher(peer)).reaches = EVERYWHERE


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):
            await asyncio.sleep(0.01)
        return found


async def in_trio(peer: Peer, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    return await peer.transport._thread.call(function, *arguments, timeout=PATIENCE, what="testing")


@pytest.mark.parametrize("listens", [False, True])
async def test_a_relayed_stream_moves_to_a_direct_connection_by_itself(listens):
    async with RelayedPeers() as peers:
        relay = await peers.relay()
        server = await peers.server(relay)
        [address] = await server.through(relay)
        client = peers.client(listen_on=[PLACE] if listens else [])
        await everywhere(server, client)
        if listens:
            await client.listen()
        stream = await client.transport.open_stream(address)
        await until(lambda: stream.path != "relayed")
        await check_echo(stream, 0, 100_000)
        assert (await puncher(client)).status(server.id) == ""
        assert (await puncher(server)).status(client.id) == ""
        further = await client.transport.open_stream(address)
        assert further.path == stream.path


async def test_a_peer_that_nobody_sees_from_outside_stays_relayed_and_says_so():
    async with RelayedPeers() as peers:
        relay = await peers.relay()
        server = await peers.server(relay)
        [address] = await server.through(relay)
        client = peers.client()
        stream = await client.transport.open_stream(address)
        at_server = await puncher(server)
        said = await until(lambda: "failed" in (said := at_server.status(client.id)) and said)
        assert said.endswith("no peer says by which address it sees this one from outside")
        assert stream.path == "relayed"
        await check_echo(stream, 1000)


async def test_a_hole_is_not_punched_where_there_is_a_direct_connection_nor_by_nonsense():
    async with RelayedPeers() as peers:
        server = await peers.relay(relay="off")
        client = peers.client()
        stream = await client.transport.open_stream(server.addresses[0])
        host = client.transport._host
        [connection] = host.connections(ID.from_string(server.id))
        connect = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[Multiaddr("/ip4/127.0.0.9/tcp/9").to_bytes()])

        async def answer_to(message: bytes) -> bytes:
            try:
                opened = await host.open_stream_on(connection, DCUTR)
                await opened.write(encode_varint_prefixed(message))
                return await opened.read(1)
            except Exception:
                return b""

        assert await in_trio(client, answer_to, connect.SerializeToString()) == b""
        assert await in_trio(client, answer_to, b"\xff" * 100) == b""
        assert is_direct(connection)
        await check_echo(stream, 1000)


def test_only_so_many_addresses_and_only_those_that_can_be_dialled_are_taken():
    told = [
        b"\xff",
        b"",
        *(
            Multiaddr(text).to_bytes()
            for text in (
                "/ip4/11.0.0.9/udp/1/quic-v1",
                "/ip4/192.168.0.9/tcp/1",
                "/ip4/127.0.0.1/tcp/1",
                "/ip4/11.0.0.9/tcp/0",
                "/dns4/example.org/tcp/1",
                "/ip4/11.0.0.9/tcp/1/ws",
                "/ip4/11.0.0.9/tcp/1",
                "/ip4/11.0.0.9/tcp/1",
                "/ip6/2a00::9/tcp/1",
            )
        ),
    ]
    usable = [Multiaddr("/ip4/11.0.0.9/tcp/1"), Multiaddr("/ip6/2a00::9/tcp/1")]
    assert _usable_addresses(told, frozenset(["public"])) == usable
    many = (Multiaddr(f"/ip4/11.0.0.9/tcp/{port}").to_bytes() for port in range(1, 1000))
    assert len(_usable_addresses(many, frozenset(["public"]))) == MAX_ADDRESSES

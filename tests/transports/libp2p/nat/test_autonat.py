"""Peers on loopback that dial each other back, and what others can make them dial."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

import msgspec
from libp2p.abc import INetConn
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from relayed_peers import Peer, RelayedPeers

from swarmcore.errors import PeerUnreachableError
from swarmcore.types import PeerId
from swarmcore_transports.libp2p.nat import autonat
from swarmcore_transports.libp2p.nat.autonat import MAX_PORTS, PROTOCOL, DialBackRateLimiter, DialBackReply

CLOSED = 1


def port(peer: Peer) -> int:
    return int(peer.addresses[0].location.split("/")[4])


async def connection(asker: Peer, other: Peer) -> INetConn:
    if not asker.transport._host:
        await asker.transport.trio_side()
    stream = await asker.transport.open_stream(other.addresses[0])
    await stream.close()
    [found] = connections(asker, other)
    return found


def connections(one: Peer, other: Peer) -> list[INetConn]:
    return one.transport._host.connections(ID.from_string(other.id))


async def ask(asker: Peer, other: Peer, ports: list[int]) -> DialBackReply:
    carrier = await connection(asker, other)
    services, thread = asker.transport._services, asker.transport._thread
    return await thread.call(services.autonat.request_dial_back, carrier, ports, timeout=10, what="asking")


@pytest.fixture
async def peers():
    async with RelayedPeers() as made:
        yield made


async def listening(peers: RelayedPeers) -> Peer:
    return await peers.relay(relay="off")


async def test_ports_where_the_asker_proves_itself_are_reached_and_no_connection_stays(peers):
    asker, other, third = [await listening(peers) for _ in range(3)]
    reply = await ask(asker, other, [CLOSED, port(third), port(asker)])
    assert reply == DialBackReply("127.0.0.1", (port(asker),))
    assert len(connections(asker, other)) == len(connections(other, asker)) == 1
    assert connections(third, other) == []


async def test_only_so_many_ports_are_dialled(peers):
    asker, other = [await listening(peers) for _ in range(2)]
    assert (await ask(asker, other, [*range(1, MAX_PORTS + 1), port(asker)])).reached == ()


async def test_a_peer_that_asks_again_at_once_is_refused(peers):
    asker, other = [await listening(peers) for _ in range(2)]
    await ask(asker, other, [port(asker)])
    with pytest.raises(PeerUnreachableError, match="asked less than 15 s ago"):
        await ask(asker, other, [port(asker)])


async def test_no_peer_can_have_a_third_one_dialled(peers):
    dialled = []
    third = await asyncio.start_server(lambda reader, writer: dialled.append(writer), "127.0.0.9", 0)
    at = third.sockets[0].getsockname()[1]
    asker, other = await listening(peers), await listening(peers)
    carrier = await connection(asker, other)
    services, thread = asker.transport._services, asker.transport._thread
    request = msgspec.msgpack.encode({"ports": [at], "host": "127.0.0.9", "addresses": [f"127.0.0.9:{at}"]})

    async def ask_in_own_words() -> bytes:
        stream = await services.host.open_stream_on(carrier, PROTOCOL)
        await stream.write(encode_varint_prefixed(request))
        return await read_varint_prefixed_bytes_limited(stream, 1024)

    reply = msgspec.msgpack.decode(await thread.call(ask_in_own_words, timeout=10, what="asking"))
    assert (reply["host"], reply["reached"]) == ("127.0.0.1", [])
    third.close()
    await third.wait_closed()
    assert dialled == []


async def test_a_relayed_peer_is_not_dialled_back(peers):
    relay = await peers.relay()
    server = await peers.server(relay)
    [address] = await server.through(relay)
    client = peers.client()
    await client.transport.open_stream(address)
    services, thread = client.transport._services, client.transport._thread
    [carrier] = connections(client, server)
    with pytest.raises(PeerUnreachableError, match="only those that are connected directly"):
        await thread.call(services.autonat.request_dial_back, carrier, [CLOSED], timeout=10, what="asking")


async def test_nonsense_ends_one_stream_and_nothing_else(peers):
    asker, other = [await listening(peers) for _ in range(2)]
    carrier = await connection(asker, other)
    services, thread = asker.transport._services, asker.transport._thread

    async def talk_nonsense() -> bytes:
        stream = await services.host.open_stream_on(carrier, PROTOCOL)
        await stream.write(encode_varint_prefixed(b"\xff nonsense"))
        return await stream.read(1)

    with pytest.raises(Exception, match=r"stream|broke|ended"):
        await thread.call(talk_nonsense, timeout=10, what="asking")
    assert (await ask(asker, other, [port(asker)])).reached == (port(asker),)


def test_peers_at_one_address_share_a_rate():
    rates = DialBackRateLimiter()
    peers = [PeerId(str(number)) for number in range(autonat._MAX_PER_HOST + 1)]
    *admitted, last = [rates.admit(peer, "11.0.0.2", 0.0) for peer in peers]
    assert set(admitted) == {""}
    assert last == "11.0.0.2 was dialled 8 times in a minute"
    assert rates.admit(peers[-1], "11.0.0.3", 0.0) == ""
    assert rates.admit(peers[0], "11.0.0.2", 60.0) == ""


def test_what_is_remembered_of_askers_is_bounded(monkeypatch):
    monkeypatch.setattr(autonat, "_MAX_RECENT", 2)
    rates = DialBackRateLimiter()
    said = [rates.admit(PeerId(str(number)), f"11.0.0.{number}", 0.0) for number in range(3)]
    assert said == ["", "", "too many peers ask"]

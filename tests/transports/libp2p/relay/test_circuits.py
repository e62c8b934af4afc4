"""Peers that reach each other through relays, over real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import pytest_asyncio
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PeerMessage
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as HOP
from libp2p.relay.circuit_v2.protocol import STOP_PROTOCOL_ID as STOP
from libp2p.relay.circuit_v2.protocol_buffer import StatusCode
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr
from relayed_peers import PATIENCE, PLACE, Peer, RelayedPeers, check_echo, check_end

from swarmcore.errors import AddressError, ConnectionLostError, PeerUnreachableError, StreamClosedError
from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.multiaddrs import to_multiaddr
from swarmcore_transports.libp2p.relay.limits import RelayLimits

MIB = 2**20


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[RelayedPeers]:
    async with RelayedPeers() as peers:
        yield peers


def through(relay: Peer, peer: str) -> Address:
    """The address of ``peer`` at ``relay``, whether it has a reservation there or not."""
    location = relay.addresses[0].location
    return Address("libp2p", f"{location}/{relay.id}/p2p-circuit/p2p", peer)


async def ask(asker: Peer, target: Address, protocol: str, message: HopMessage | StopMessage) -> int:
    """The status with which ``target`` answers ``message``."""
    thread, host = await asker.transport.trio_side()

    async def exchange() -> int:
        peer = ID.from_string(target.peer)
        await host.connect(peer, Multiaddr(str(to_multiaddr(target))))
        stream = await host.libp2p.new_stream(peer, [protocol])
        await write_delimited_msg(stream, message)
        answer = await read_delimited_msg(stream, type(message))
        return int(answer.status)

    return await thread.call(exchange, timeout=10, what="asking")


async def becomes_public(peer: Peer) -> None:
    thread, host = await peer.transport.trio_side()
    thread.call_soon_trio(
        host.addresses.put,
        "listening",
        [Multiaddr("/ip4/11.0.0.1/tcp/4001"), *host.addresses.of("listening")],
    )


async def test_messages_of_any_size_go_through_a_relay(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    stream = await peers.client().transport.open_stream(address)
    assert stream.path == "relayed"
    assert stream.remote == server.id
    await check_echo(stream, 0, 1, 70_000, 3 * MIB)
    await stream.close()


async def test_bulk_goes_both_ways_at_once(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    client = peers.client().transport
    streams = [await client.open_stream(address) for _ in range(3)]
    message = bytes(MIB)

    async def send(stream):
        for _ in range(3):
            await stream.send(message)

    async def receive(stream):
        for _ in range(3):
            assert len(await stream.receive()) == MIB

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(part(stream) for stream in streams for part in (send, receive)))


async def test_clients_of_one_server_do_not_disturb_each_other(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    first, second = peers.client(), peers.client()
    staying = await second.transport.open_stream(address)
    leaving = await first.transport.open_stream(address)
    await check_echo(leaving, 10)
    await first.transport.close()
    await check_echo(staying, 100_000)
    await check_echo(await peers.client().transport.open_stream(address), 10)


async def test_a_circuit_ends_at_its_bytes(peers: RelayedPeers):
    relay = await peers.relay(relay_limits=RelayLimits(circuit_bytes=200_000))
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    client = peers.client()
    stream = await client.transport.open_stream(address)
    await check_echo(stream, 50_000)
    with pytest.raises((ConnectionLostError, StreamClosedError)):
        await check_echo(stream, 300_000)
    await check_echo(await client.transport.open_stream(address), 50_000)  # by a new circuit


async def test_a_circuit_ends_at_its_time(peers: RelayedPeers):
    relay = await peers.relay(relay_limits=RelayLimits(circuit_seconds=1.5))
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    stream = await peers.client().transport.open_stream(address)
    await check_end(stream)


async def test_a_relay_that_is_full_says_so(peers: RelayedPeers):
    relay = await peers.relay(relay_limits=RelayLimits(circuits=1))
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    first = peers.client()
    await check_echo(await first.transport.open_stream(address), 10)
    second = peers.client()
    with pytest.raises(PeerUnreachableError, match="no room for a further circuit"):
        await second.transport.open_stream(address)
    await first.transport.close()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                stream = await second.transport.open_stream(address)
                break
            except PeerUnreachableError:
                continue
    await check_echo(stream, 10)


async def test_a_peer_without_a_reservation(peers: RelayedPeers):
    relay = await peers.relay()
    with pytest.raises(PeerUnreachableError, match="has no reservation for that peer"):
        await peers.client().transport.open_stream(through(relay, Identity.generate().peer))


async def test_a_place_is_free_when_its_peer_has_left(peers: RelayedPeers):
    relay = await peers.relay(relay_limits=RelayLimits(reservations=1))
    first = await peers.server(relay)
    (address,) = await first.through(relay)
    await first.transport.close()
    second = await peers.server(relay)
    await second.through(relay)
    with pytest.raises(PeerUnreachableError, match="has no reservation"):
        await peers.client().transport.open_stream(address)


async def test_what_is_no_relay_says_so(peers: RelayedPeers):
    relay = await peers.relay(relay="off")
    with pytest.raises(PeerUnreachableError, match="relays for nobody"):
        await peers.client().transport.open_stream(through(relay, Identity.generate().peer))


async def test_a_relay_that_is_gone(peers: RelayedPeers):
    relay = await peers.relay()
    await relay.transport.close()
    with pytest.raises(PeerUnreachableError, match=r"cannot reach .* the relay of .*refused"):
        await peers.client().transport.open_stream(through(relay, Identity.generate().peer))


async def test_a_relay_has_the_peers_that_it_relays_for_next_to_it(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    stream = await relay.transport.open_stream(address)  # over the connection that there is
    assert stream.path == "direct"
    with pytest.raises(PeerUnreachableError, match="through this very peer, and has left"):
        await relay.transport.open_stream(through(relay, Identity.generate().peer))


async def test_nobody_takes_a_place_in_the_name_of_another(peers: RelayedPeers):
    relay, forger, victim = await peers.relay(), peers.client(), Identity.generate().peer
    name = PeerMessage(id=ID.from_string(victim).to_bytes())
    message = HopMessage(type=HopMessage.RESERVE, peer=name)
    assert await ask(forger, relay.addresses[0], HOP, message) == StatusCode.OK
    with pytest.raises(PeerUnreachableError, match="has no reservation"):
        await peers.client().transport.open_stream(through(relay, victim))


async def test_a_place_is_not_given_through_another_relay(peers: RelayedPeers):
    outer = await peers.relay()
    inner = await peers.server(outer, relay="on")
    (address,) = await inner.through(outer)
    message = HopMessage(type=HopMessage.RESERVE)
    assert await ask(peers.client(), address, HOP, message) == StatusCode.PERMISSION_DENIED


async def test_circuits_are_taken_from_own_relays_only(peers: RelayedPeers):
    server = await peers.server()
    source = PeerMessage(id=ID.from_string(Identity.generate().peer).to_bytes())
    message = StopMessage(type=StopMessage.CONNECT, peer=source)
    assert await ask(peers.client(), server.addresses[0], STOP, message) == StatusCode.PERMISSION_DENIED


async def test_a_peer_that_does_not_take_its_circuit(peers: RelayedPeers):
    relay, deaf = await peers.relay(), peers.client()
    await deaf.transport.trio_side()
    assert await ask(deaf, relay.addresses[0], HOP, HopMessage(type=HopMessage.RESERVE)) == StatusCode.OK
    with pytest.raises(PeerUnreachableError, match="the peer behind it did not answer"):
        await peers.client().transport.open_stream(through(relay, deaf.id))


async def test_another_relay_is_taken_when_one_dies(peers: RelayedPeers):
    relays = [await peers.relay() for _ in range(3)]
    server = await peers.server(*relays)
    held = await server.announces(lambda addresses: len(addresses) == 2)
    dead, alive = (next(relay for relay in relays if relay.id in str(address)) for address in held)
    (spare,) = (relay for relay in relays if relay not in (dead, alive))
    client = peers.client()
    stream = await client.transport.open_stream(held[1])
    await dead.transport.close()
    _, address = await server.through(alive, spare)
    await check_echo(stream, 1000)
    await check_echo(await peers.client().transport.open_stream(address), 1000)


async def test_a_given_relay_is_found_again_when_it_comes_back(peers: RelayedPeers):
    identity = Identity.generate()
    relay = await peers.relay(identity)
    place = relay.addresses[0].location.removesuffix("/p2p")
    server = await peers.server(relay)
    await server.through(relay)
    await relay.transport.close()
    assert await server.through() == []
    relay = await peers.relay(identity, listen_on=[place])
    (address,) = await server.through(relay)
    await check_echo(await peers.client().transport.open_stream(address), 1000)


async def test_streams_end_when_their_relay_dies(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    (address,) = await server.through(relay)
    stream = await peers.client().transport.open_stream(address)
    await check_echo(stream, 10)
    await relay.transport.close()
    await check_end(stream)


async def test_a_relay_is_found_among_connected_peers(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server()
    await server.transport.open_stream(relay.addresses[0])
    (address,) = await server.through(relay)
    await check_echo(await peers.client().transport.open_stream(address), 1000)


async def test_a_peer_relays_once_everybody_reaches_it(peers: RelayedPeers):
    relay = await peers.relay(relay="auto")
    server = await peers.server()
    await server.transport.open_stream(relay.addresses[0])
    with pytest.raises(PeerUnreachableError, match="relays for nobody"):
        await peers.client().transport.open_stream(through(relay, server.id))
    await becomes_public(relay)
    (address,) = await server.through(relay)
    assert address.location.startswith("/ip4/11.0.0.1/")  # not the one that others cannot dial


async def test_a_peer_that_everybody_reaches_gives_its_reservations_back(peers: RelayedPeers):
    relay = await peers.relay()
    server = await peers.server(relay)
    await server.through(relay)
    await becomes_public(server)
    assert await server.through() == []


async def test_what_cannot_be_a_relay_is_refused_at_once(peers: RelayedPeers):
    peer, relay = Identity.generate().peer, Identity.generate().peer
    for text, said in [
        ("/ip4/192.0.2.1/tcp/4001", "peer id|form"),
        ("192.0.2.1:4001", "form|address"),
        (f"/ip4/192.0.2.1/tcp/4001/p2p/{relay}/p2p-circuit/p2p/{peer}", "leads through one itself"),
        (f"/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{relay}", "TCP"),
    ]:
        with pytest.raises(AddressError, match=said):
            Libp2pTransport(Identity.generate(), listen_on=[PLACE], relays=[text])


async def test_a_relay_that_says_nothing_is_given_up(peers: RelayedPeers):
    """One that takes the question and never answers: asking ends with the time that the caller has."""
    relay = await peers.relay(relay="off")
    thread, host = await relay.transport.trio_side()

    async def silent(stream: object) -> None:
        await trio.sleep_forever()

    thread.call_soon_trio(host.serve, HOP, silent)
    client = peers.client()
    with pytest.raises(PeerUnreachableError, match=r"did not answer within 0\.5 s"):
        client.transport.limits = client.transport.limits.__class__(connect_timeout=0.5)
        await client.transport.open_stream(through(relay, Identity.generate().peer))

"""What is wrong in py-libp2p as it comes. Where a test fails, that repair is needed no more: remove it."""

from __future__ import annotations

import inspect
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
import trio.lowlevel
from libp2p.host.autonat.autonat import AutoNATService
from libp2p.host.observed_addr_manager import ACTIVATION_THRESHOLD
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection import swarm_connection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.relay.circuit_v2.dcutr import DCUtRProtocol
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux
from libp2p.transport.tcp import tcp
from multiaddr import Multiaddr
from packaging.specifiers import SpecifierSet
from raw_libp2p import RawPeer, cut
from trio.testing import memory_stream_pair
from yamux_pairs import (
    DATA,
    PEER,
    SYN,
    WINDOW,
    Pipe,
    busy_both_ways,
    header,
    muxer_and_bytes,
    pair,
    virtual,
)

from swarmcore.identity import Identity
from swarmcore_transports.libp2p.patches import CHECKED

LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")


def test_the_repairs_were_checked_with_this_version() -> None:
    """If this fails, look whether the repairs still hold for the version, and widen `CHECKED`."""
    assert version("libp2p") in SpecifierSet(",".join(CHECKED))


def upstream(pipe: Pipe) -> Yamux:
    return Yamux(pipe, PEER, pipe.is_initiator)  # type: ignore[arg-type]


def a_peer() -> ID:
    return ID.from_string(Identity.generate().peer)


# --- yamux ------------------------------------------------------------------------------------------------


def test_much_both_ways_stops_for_good() -> None:
    async def main() -> None:
        async with pair(upstream) as ends:
            await busy_both_ways(ends, 2 * 2**20)

    with pytest.raises(trio.TooSlowError):
        virtual(main)


def test_a_writer_whose_peer_does_not_read_for_five_seconds_fails() -> None:
    async def main() -> None:
        async with pair(upstream) as (left, _):
            stream = await left.open_stream()
            with pytest.raises(MuxedStreamError, match="5 seconds"):
                await stream.write(bytes(2**20))

    virtual(main)


def test_a_cancelled_write_leaves_half_a_frame() -> None:
    written = bytearray()

    class FullPipe(Pipe):
        async def write(self, data: bytes) -> None:
            written.extend(data[:20])
            if len(data) > 20:
                await trio.sleep_forever()

    async def main() -> None:
        async with muxer_and_bytes(lambda pipe: upstream(FullPipe(pipe.stream, False))) as (_, muxer):
            stream = await muxer.open_stream()
            written.clear()
            with trio.move_on_after(0.1):
                await stream.write(b"a" * 100)
            await stream.write(b"b")
            assert written == header(DATA, 0, 2, 100) + b"a" * 8 + header(DATA, 0, 2, 1) + b"b"

    virtual(main)


def test_each_message_that_is_read_costs_a_frame_back() -> None:
    async def main() -> None:
        async with muxer_and_bytes(upstream) as (peer, muxer):
            await peer.send_all(header(WINDOW, SYN, 1, 0))
            stream = await muxer.accept_stream()
            for _ in range(100):
                await peer.send_all(header(DATA, 0, 1, 1000) + bytes(1000))
                await stream.read(2000)
            await trio.sleep(0.1)
            assert len(await peer.receive_some()) > 50 * 12

    virtual(main)


def test_what_a_reset_stream_has_not_read_is_kept() -> None:
    async def main() -> None:
        async with muxer_and_bytes(upstream) as (peer, muxer):
            await peer.send_all(header(WINDOW, SYN, 1, 0) + header(DATA, 0, 1, 1000) + bytes(1000))
            stream: Any = await muxer.accept_stream()
            await trio.sleep(0.1)
            await stream.reset()
            assert len(muxer.stream_buffers[1]) == 1000

    virtual(main)


def test_a_silent_peer_is_never_lost() -> None:
    async def main() -> None:
        async with muxer_and_bytes(upstream) as (_, muxer):
            await trio.sleep(3000)
            assert not muxer.is_closed

    virtual(main)


def test_stream_257_waits_for_ever() -> None:
    async def main() -> None:
        async with pair(upstream, memory_stream_pair) as (left, _):
            for _ in range(256):
                await left.open_stream()
            with trio.move_on_after(60) as patience:
                await left.open_stream()
            assert patience.cancelled_caught

    virtual(main)


def test_a_frame_of_megabytes_is_taken_and_unread_bytes_have_no_bound() -> None:
    megabytes = bytes(8 * 2**20)

    async def main() -> None:
        async with muxer_and_bytes(upstream) as (peer, muxer):
            for stream_id in range(1, 13, 2):
                await peer.send_all(header(DATA, SYN, stream_id, len(megabytes)) + megabytes)
            await trio.sleep(1)
            assert sum(map(len, muxer.stream_buffers.values())) == 6 * len(megabytes)

    virtual(main)


def test_the_muxer_that_was_given_is_not_used() -> None:
    class Ours(Yamux):
        pass

    async def main() -> None:
        left, right = memory_stream_pair()
        made: list[Any] = []

        async def make(pipe: Pipe) -> None:
            muxer = MuxerMultistream({PROTOCOL_ID: Ours})  # type: ignore[dict-item]
            made.append(await muxer.new_conn(pipe, PEER))  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make, Pipe(left, True))
            nursery.start_soon(make, Pipe(right, False))
        assert [type(one) for one in made] == [Yamux, Yamux]

    virtual(main)


# --- sockets ----------------------------------------------------------------------------------------------


async def never(*arguments: object) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("step", ["bind", "connect"])
def test_a_dial_that_is_cancelled_leaks_its_socket(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(bind=AsyncMock(), connect=AsyncMock())
    getattr(made, step).side_effect = never
    monkeypatch.setattr(tcp.trio.socket, "socket", lambda *arguments: made)

    async def main() -> None:
        with trio.move_on_after(1):
            await tcp._open_tcp_stream_from("192.0.2.7", 4001, ("0.0.0.0", 4001))

    virtual(main)
    made.close.assert_not_called()


def test_a_listener_that_is_cancelled_leaks_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(bind=AsyncMock(side_effect=never))
    monkeypatch.setattr(tcp.trio.socket, "socket", lambda *arguments: made)

    async def main() -> None:
        with trio.move_on_after(1):
            await tcp._open_reuseport_listeners("127.0.0.1", 4001)

    virtual(main)
    made.close.assert_not_called()


def test_a_socket_of_ipv6_has_no_remote_address() -> None:
    peer = SimpleNamespace(getpeername=lambda: ("2001:db8::7", 4001, 0, 0))
    assert TrioTCPStream(SimpleNamespace(socket=peer)).get_remote_address() is None  # type: ignore[arg-type]


# --- host -------------------------------------------------------------------------------------------------


def on_one_host(main: Any) -> None:
    """Run ``main`` with the host of a peer of py-libp2p alone, which listens."""

    async def run() -> None:
        host = RawPeer().host
        with trio.fail_after(20):
            async with host.run(listen_addrs=[LOOPBACK]):
                await main(host)

    trio.run(run)


@asynccontextmanager
async def client_of(host: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Another host, and its connection to ``host``, cut at the end."""
    client = RawPeer().host
    async with client.run(listen_addrs=[]):
        await client.connect(PeerInfo(host.get_id(), host.get_transport_addrs()))
        [connection] = client.get_network().get_connections(host.get_id())
        try:
            yield client, connection
        finally:
            with trio.CancelScope(shield=True):
                for one in [connection, *host.get_network().get_connections()]:
                    await cut(one)


def test_one_stream_that_goes_wrong_ends_the_whole_host() -> None:
    async def attack(host: Any) -> None:
        async with client_of(host) as (_, connection):
            stream = await connection.muxed_conn.open_stream()
            await stream.write(b"\x13/multistream/1.0.0\n" + b"\x05\xff\xfe\xfd\xfc\n")
            await trio.sleep(5)

    with pytest.raises(BaseExceptionGroup) as ended:
        on_one_host(attack)
    assert ended.group_contains(UnicodeDecodeError)


def test_two_hosts_may_listen_on_one_port() -> None:
    async def listen_there_too(host: Any) -> None:
        [place] = host.get_transport_addrs()
        other = RawPeer().host
        async with other.run(listen_addrs=[]):
            assert await other.get_network().listen(place)

    on_one_host(listen_there_too)


def test_an_inbound_connection_that_has_ended_keeps_its_place() -> None:
    async def connect_and_leave(host: Any) -> None:
        async with client_of(host) as (_, connection):
            await connection.close()
            while host.get_network().get_connections():
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert host.get_network()._inbound_limiter.borrowed_tokens == 1

    on_one_host(connect_and_leave)


def test_closing_a_connection_takes_200_ms_however_fast_the_peer_is() -> None:
    async def close(host: Any) -> None:
        async with client_of(host) as (_, connection):
            started = trio.current_time()
            await connection.close()
            assert trio.current_time() - started >= 0.2

    on_one_host(close)


def test_whomever_the_peer_store_knows_is_dialled() -> None:
    dialled: list[ID] = []
    known = a_peer()

    async def main() -> None:
        async def dial_peer(peer: ID) -> None:
            dialled.append(peer)

        swarm = Mock()
        swarm.connection_config = ConnectionConfig(min_connections=0, low_watermark=0, high_watermark=10)
        swarm.get_total_connections.return_value = 0
        swarm.get_connections.return_value = []
        connector = AutoConnector(swarm)
        connector._get_candidate_peers = lambda: _result([known])  # type: ignore[method-assign, assignment, return-value]
        swarm.dial_peer = dial_peer
        await connector.start()
        await connector.maybe_connect()

    virtual(main)
    assert dialled == [known]


async def _result(value: Any) -> Any:
    return value


def test_a_module_logs_through_the_root_logger() -> None:
    assert "    logging.debug(" in inspect.getsource(swarm_connection)


# --- NAT --------------------------------------------------------------------------------------------------


def test_autonat_calls_a_closed_port_reachable() -> None:
    """Which is why nat/autonat.py dials afresh: the library counts the connection that is there."""

    async def ask(host: Any) -> None:
        async with client_of(host) as (client, _):
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                address = Multiaddr(f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}").to_bytes()
                service = AutoNATService(host, serve=False)
                assert await service._try_dial(client.get_id(), [address]) == address

    on_one_host(ask)


def test_a_peer_that_listens_nowhere_has_no_address_for_hole_punching() -> None:
    """Which is why nat/hole_punching.py is not the library's: clients listen nowhere (docs/libp2p.md)."""

    async def main() -> None:
        host = Mock()
        host.get_addrs.return_value = []
        host._observed_addr_manager.addrs.return_value = [Multiaddr("/ip4/11.0.0.3/tcp/40123")]
        assert await DCUtRProtocol(host)._get_observed_addrs() == []

    virtual(main)


def test_an_observed_address_is_told_once_four_peers_agree() -> None:
    """Which is why nat/observed_addresses.py asks itself: behind a router, most know one relay or two."""
    assert ACTIVATION_THRESHOLD == 4


# --- Kademlia ---------------------------------------------------------------------------------------------


def test_a_key_keeps_its_first_twenty_providers_and_there_may_be_any_number_of_keys() -> None:
    store = ProviderStore(Mock())
    first, *_, last = providers = [PeerInfo(a_peer(), []) for _ in range(21)]
    for provider in providers:
        store.add_provider(b"key", provider)
    found = [info.peer_id for info in store.get_providers(b"key")]
    assert first.peer_id in found and last.peer_id not in found
    for number in range(10_000):
        store.add_provider(b"%d" % number, first)
    assert len(store.providers) == 10_001


def test_every_value_is_kept_for_a_day() -> None:
    store = ValueStore(Mock(), PEER)
    store.put_record(b"key", Record(key=b"key", value=b"value"))
    assert store.store[b"key"][1] > time.time() + 80_000


def test_a_reply_names_all_that_are_close_with_their_signed_records() -> None:
    dht: Any = Mock()
    dht.host.get_peerstore().get_peer_record().marshal_envelope.return_value = bytes(200)
    dht.host.get_peerstore().addrs.return_value = []
    dht.host.get_network().connections = {}
    response = Message()
    KadDHT._add_closer_peers_to_response(dht, response, [a_peer() for _ in range(20)])
    assert len(response.closerPeers) == 20 and all(peer.signedRecord for peer in response.closerPeers)


def test_whoever_asks_is_taken_for_a_node() -> None:
    assert "self.add_peer(peer_id, skip_server_mode_check=True)" in inspect.getsource(KadDHT)

"""What TCP promises beyond the contract that all transports share."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl

import attrs
import pytest
from tcp_peers import echo, listening, round_trip, settle

from swarmcore.errors import (
    AddressError,
    AddressInUseError,
    InputError,
    MessageTooLargeError,
    PeerUnreachableError,
    StreamAbortedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed import connection as connection_module
from swarmcore_transports.framed.flow_control import MESSAGE_COST
from swarmcore_transports.tcp import TcpTransport
from swarmcore_transports.tcp.addresses import endpoint_of
from swarmcore_transports.tcp.handshake import dialler_context

pytestmark = pytest.mark.every_loop


# --- connections ---------------------------------------------------------------------------------------


async def test_a_stream_that_ended_well_leaves_its_connection_to_the_next() -> None:
    async with listening() as (listener, dialler, address):
        for _ in range(5):
            stream = await dialler.open_stream(address)
            await round_trip(stream)
            await stream.end()
            await stream.close()
            await settle(lambda: "1 connections, 1 idle" in repr(dialler))
        assert "1 connections, 1 idle" in repr(listener)


async def test_streams_at_the_same_time_have_connections_of_their_own() -> None:
    async with listening() as (_, dialler, address):
        streams = [await dialler.open_stream(address) for _ in range(3)]
        assert "3 connections, 0 idle" in repr(dialler)
        for stream in streams:
            await round_trip(stream)


async def test_an_aborted_stream_takes_its_connection_along() -> None:
    async with listening() as (listener, dialler, address):
        stream = await dialler.open_stream(address)
        await round_trip(stream)
        stream.abort("done")
        await settle(lambda: "0 connections" in repr(dialler) and "0 connections" in repr(listener))


async def test_an_idle_connection_to_a_peer_that_left_is_not_used() -> None:
    async with listening() as (listener, dialler, address):
        stream = await dialler.open_stream(address)
        await round_trip(stream)
        await stream.close()
        await settle(lambda: "1 idle" in repr(dialler))
        await listener.close()
        with pytest.raises(PeerUnreachableError):
            await dialler.open_stream(address)


async def test_tls_1_3_without_nagle() -> None:
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    async def accept(stream: Stream) -> None:
        accepted.set_result(stream)
        await echo(stream)

    async with listening(accept) as (_, dialler, address):
        stream = await dialler.open_stream(address)
        await round_trip(stream)
        for end in (stream, await accepted):
            socket_transport = end._connection.transport
            assert socket_transport.get_extra_info("ssl_object").version() == "TLSv1.3"
            sock = socket_transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    context = dialler_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening() as (_, _, address):
        endpoint = endpoint_of(address)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context, server_hostname="")


# --- places --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["[::1]:0", "0.0.0.0:0", "[::]:0", "localhost:0"])
async def test_places(place: str) -> None:
    async with listening(place=place) as (_, dialler, address):
        assert ":0/" not in str(address) and "0.0.0.0" not in str(address) and "[::]" not in str(address)
        await round_trip(await dialler.open_stream(address))


async def test_a_host_name_is_dialled() -> None:
    async with listening() as (_, dialler, address):
        named = attrs.evolve(address, location=f"//localhost:{endpoint_of(address).port}")
        await round_trip(await dialler.open_stream(named))


async def test_a_port_in_use_says_so() -> None:
    async with listening() as (_, _, address):
        second = TcpTransport(Identity.generate(), listen_on=["127.0.0.1:0", address.location[2:]])
        with pytest.raises(AddressInUseError, match=f"{endpoint_of(address)}: the port is in use"):
            await second.listen(echo)
        second.listen_on = ("127.0.0.1:0",)
        await second.listen(echo)
        with pytest.raises(InputError, match="listens already"):
            await second.listen(echo)
        await second.close()


@pytest.mark.parametrize("place", ["no-such-host.invalid:0", "192.0.2.77:0", "nonsense", "127.0.0.1:99999"])
async def test_a_place_that_cannot_be_listened_on(place: str) -> None:
    transport = TcpTransport(Identity.generate(), listen_on=[place])
    with pytest.raises(AddressError):
        await transport.listen(echo)
    await transport.close()


async def test_a_host_that_does_not_resolve_is_unreachable() -> None:
    dialler = TcpTransport(Identity.generate())
    with pytest.raises(PeerUnreachableError, match=r"no-such-host\.invalid:1"):
        await dialler.open_stream(Address("tcp", "//no-such-host.invalid:1", Identity.generate().peer))
    await dialler.close()


# --- bounds --------------------------------------------------------------------------------------------


async def test_what_waits_for_a_slow_reader_is_exactly_bounded() -> None:
    limits = Limits(send_buffer=256 * 1024)
    size = 10_000
    over = asyncio.Event()

    async def hold(stream: Stream) -> None:
        await over.wait()

    async with listening(hold, limits=limits) as (_, dialler, address):
        stream = await dialler.open_stream(address)
        sent = 0
        try:
            async with asyncio.timeout(0.5):
                while True:
                    await stream.send(bytes(size))
                    sent += 1
        except TimeoutError:
            pass
        # The first is credited as nothing waits in front of it; behind it there is one window.
        assert sent <= 1 + limits.send_buffer // (size + MESSAGE_COST)
        over.set()


async def test_empty_messages_are_bounded_too() -> None:
    limits = Limits(send_buffer=64 * 1024)
    over = asyncio.Event()

    async def hold(stream: Stream) -> None:
        await over.wait()

    async with listening(hold, limits=limits) as (_, dialler, address):
        stream = await dialler.open_stream(address)
        sent = 0
        try:
            async with asyncio.timeout(0.5):
                while True:
                    await stream.send()
                    sent += 1
        except TimeoutError:
            pass
        assert sent <= 1 + limits.send_buffer // MESSAGE_COST
        over.set()


async def test_the_smaller_limit_of_both_sides_holds() -> None:
    small = TcpTransport(Identity.generate(), listen_on=["127.0.0.1:0"], limits=Limits(max_message=1000))
    dialler = TcpTransport(Identity.generate())
    (address,) = await small.listen(echo)
    stream = await dialler.open_stream(address)
    with pytest.raises(MessageTooLargeError, match="above the limit of 1000"):
        await stream.send(bytes(1001))
    await round_trip(stream, bytes(1000))
    await dialler.close()
    await small.close()


async def test_one_peer_cannot_open_streams_without_end() -> None:
    async with listening(limits=Limits(max_calls_per_peer=2)) as (_, dialler, address):
        streams = [await dialler.open_stream(address) for _ in range(4)]
        for stream in streams:
            await round_trip(stream)
        with pytest.raises(StreamAbortedError, match="too many streams"):
            await round_trip(await dialler.open_stream(address))
        other = TcpTransport(Identity.generate())
        await round_trip(await other.open_stream(address))
        await other.close()


# --- the end -------------------------------------------------------------------------------------------


async def test_a_connection_that_both_sides_abort_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "RETIRE_SECONDS", 3600.0)
    incoming: asyncio.Queue[Stream] = asyncio.Queue()

    async def hold(stream: Stream) -> None:
        incoming.put_nowait(stream)
        await asyncio.Event().wait()

    async with listening(hold) as (listener, dialler, address):
        near = await dialler.open_stream(address)
        far = await incoming.get()
        near.abort("enough")
        far.abort("enough")
        await settle(lambda: "0 connections" in repr(dialler) and "0 connections" in repr(listener))


async def test_an_idle_connection_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the other side no longer does anything."""
    async with listening() as (listener, dialler, address):
        stream = await dialler.open_stream(address)
        await round_trip(stream)
        await stream.close()
        await settle(lambda: "1 idle" in repr(dialler) and "1 idle" in repr(listener))
        monkeypatch.setattr(connection_module, "RETIRE_SECONDS", 3600.0)
        monkeypatch.setattr(connection_module.Connection, "buffer_updated", lambda *_: None)
        await dialler.close()
        assert "0 connections" in repr(dialler)


async def test_a_listener_drops_idle_connections_but_none_that_is_just_taken() -> None:
    async with listening(limits=Limits(max_calls=1)) as (listener, dialler, address):
        first = await dialler.open_stream(address)
        await round_trip(first)
        second = await dialler.open_stream(address)
        await round_trip(second)
        await first.close()
        await settle(lambda: "1 idle" in repr(dialler) and "1 idle" in repr(listener))
        # The listener asks the dialler to drop the first connection, which takes it for the next stream.
        await second.close()
        third = await dialler.open_stream(address)
        for _ in range(20):
            await round_trip(third)
        fourth = await dialler.open_stream(address)
        await round_trip(fourth)
        for stream in (third, fourth):
            await stream.close()
        await settle(lambda: "1 connections, 1 idle" in repr(dialler))
        await settle(lambda: "1 connections, 1 idle" in repr(listener))


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 12, 20])
@pytest.mark.parametrize("leaver", ["listener", "dialler"])
async def test_closing_amid_handshakes_leaves_no_socket(leaver: str, turns: int) -> None:
    """Whatever is left open is a ResourceWarning, and so a failure."""
    async with listening(limits=Limits(connect_timeout=5)) as (listener, dialler, address):
        dials = [asyncio.create_task(dialler.open_stream(address)) for _ in range(10)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await (listener if leaver == "listener" else dialler).close()
        for outcome in await asyncio.gather(*dials, return_exceptions=True):
            assert isinstance(outcome, Stream | SwarmError)
    gc.collect()

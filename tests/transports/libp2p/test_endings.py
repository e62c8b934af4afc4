"""Bad addresses and peers when dialling, and what is left when things end: errors, connections, threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
from libp2p.abc import IHost, INetStream
from raw_libp2p import connect, cut, raw_peer

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    PeerIdentityError,
    PeerUnreachableError,
    ProtocolError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.host import PROTOCOL

LIMITS = Limits(connect_timeout=2.0)
STRANGER = Identity.generate().peer


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


@asynccontextmanager
async def transport(limits: Limits = LIMITS, **options: Any) -> AsyncIterator[Libp2pTransport]:
    made = Libp2pTransport(Identity.generate(), limits=limits, upnp=False, **options)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def listening(limits: Limits = LIMITS) -> AsyncIterator[tuple[Libp2pTransport, Address]]:
    async with transport(limits, listen_on=["/ip4/127.0.0.1/tcp/0"]) as made:
        (address,) = await made.listen(echo)
        yield made, address


@asynccontextmanager
async def tcp_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Address]:
    """The address of what is no libp2p peer at all."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Address("libp2p", f"/ip4/127.0.0.1/tcp/{port}/p2p", STRANGER)


# --- dialling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/300.0.0.1/tcp/1/p2p",
        "/ip4/127.0.0.1/udp/1/quic-v1/p2p",
        "/ip4/127.0.0.1/tcp/1/ws/p2p",
        "nonsense",
    ],
)
async def test_an_address_that_is_none(location: str) -> None:
    async with transport() as dialler:
        with pytest.raises(AddressError):
            await dialler.open_stream(Address("libp2p", location, STRANGER))


async def test_nobody_listens_there() -> None:
    async with tcp_server(_hang) as address:
        pass
    async with transport() as dialler:
        with pytest.raises(PeerUnreachableError, match="refused"):
            await dialler.open_stream(address)


async def test_a_server_that_speaks_something_else() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with tcp_server(http) as address, transport() as dialler:
        with pytest.raises(PeerIdentityError, match="Noise"):
            await dialler.open_stream(address)


async def test_a_server_that_says_nothing() -> None:
    limits = Limits(connect_timeout=0.3)
    async with tcp_server(_hang) as address, transport(limits) as dialler:
        with pytest.raises(PeerUnreachableError, match=r"0\.3 s"):
            await dialler.open_stream(address)


async def test_a_dial_that_is_cancelled_closes_its_socket() -> None:
    connected, closed = asyncio.Event(), asyncio.Event()

    async def wait_for_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        closed.set()
        writer.close()

    limits = Limits(connect_timeout=60.0)
    async with tcp_server(wait_for_the_end) as address, transport(limits) as dialler:
        dial = asyncio.create_task(dialler.open_stream(address))
        await connected.wait()
        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial
        async with asyncio.timeout(10):
            await closed.wait()


async def test_another_peer_than_the_one_that_was_dialled() -> None:
    async with listening() as (_, address), transport() as dialler:
        with pytest.raises(PeerIdentityError):
            await dialler.open_stream(Address("libp2p", address.location, STRANGER))
        assert await dialler.open_stream(address)


async def test_a_libp2p_peer_that_is_none_of_ours() -> None:
    async with raw_peer() as peer, transport() as dialler:
        with pytest.raises(ProtocolError, match="does not speak"):
            await dialler.open_stream(peer.address)


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def _says_nothing(stream: INetStream) -> None:
    await trio.sleep_forever()


async def _says_noise(stream: INetStream) -> None:
    await stream.write(b"\xff" * 5000)


async def _resets(stream: INetStream) -> None:
    await stream.reset()


@pytest.mark.parametrize("behaviour", [_says_nothing, _says_noise, _resets])
async def test_a_peer_that_does_not_greet(behaviour: Callable[[INetStream], Awaitable[None]]) -> None:
    async def serve(host: IHost) -> None:
        host.set_stream_handler(PROTOCOL, behaviour)

    async with raw_peer() as peer, transport(Limits(connect_timeout=1.0)) as dialler:
        await peer.run(serve)
        with pytest.raises((PeerUnreachableError, ProtocolError)):
            await dialler.open_stream(peer.address)


# --- the end ------------------------------------------------------------------------------------------


async def test_connections_give_their_places_back() -> None:
    async def reconnect(host: IHost, address: Address) -> None:
        for _ in range(25):
            connection = await connect(host, address)
            await cut(connection)
            await trio.sleep(0.01)

    async with listening(Limits(max_calls=60)) as (_, address), raw_peer() as peer:
        for _ in range(4):
            await peer.run(reconnect, address)
        async with transport() as dialler:
            stream = await dialler.open_stream(address)
            await stream.send(b"still room")
            assert bytes(await stream.receive()) == b"still room"


async def test_a_crash_ends_everything_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def crash() -> None:
        raise RuntimeError("the end of the world")

    async with listening() as (_, address), transport() as dialler:
        streams = [await dialler.open_stream(address) for _ in range(3)]
        receivers = [asyncio.create_task(stream.receive()) for stream in streams]
        assert dialler._thread
        with caplog.at_level(logging.ERROR):
            dialler._thread.start_soon(crash)
            async with asyncio.timeout(10):
                errors: list[object] = [*await asyncio.gather(*receivers, return_exceptions=True)]
        errors += await asyncio.gather(
            streams[0].send(b""), dialler.open_stream(address), return_exceptions=True
        )
        assert all(isinstance(error, ConnectionLostError) for error in errors)
        assert all("the end of the world" in str(error) for error in errors)
        assert "the end of the world" in caplog.text


async def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    async with listening() as (_, address), transport() as dialler:
        await dialler.open_stream(address)
        assert len({thread for thread in threading.enumerate() if "libp2p" in thread.name} - before) == 2
    assert not [thread for thread in set(threading.enumerate()) - before if "libp2p" in thread.name]


async def test_calls_that_wait_when_the_transport_closes() -> None:
    async with tcp_server(_hang) as address, transport(Limits(connect_timeout=60.0)) as dialler:
        dials = [asyncio.create_task(dialler.open_stream(address)) for _ in range(3)]
        while not dialler._thread:
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await dialler.close()
            errors = await asyncio.gather(*dials, return_exceptions=True)
        assert all(isinstance(error, SwarmError) for error in errors)
        with pytest.raises(StreamClosedError):
            await dialler.open_stream(address)


async def test_many_streams_at_once() -> None:
    limits = Limits(max_calls_per_peer=400)

    async def call(dialler: Libp2pTransport, address: Address, n: int) -> Stream:
        stream = await dialler.open_stream(address)
        await stream.send(b"%d" % n)
        assert bytes(await stream.receive()) == b"%d" % n
        return stream

    async with listening(limits) as (_, address), transport(limits) as dialler:
        streams = await asyncio.gather(*(call(dialler, address, n) for n in range(300)))
        assert len(streams) == 300

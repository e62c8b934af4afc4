"""Listeners that are no peers, and diallers that do not prove who they are."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from small_resources import bounded
from tcp_peers import listening, round_trip, settle

from swarmcore.errors import (
    PeerIdentityError,
    PeerUnreachableError,
    SwarmError,
    UnavailableError,
)
from swarmcore.identity import Identity
from swarmcore.resources import Bounds, Resource
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.frames import FrameType, encode_frame
from swarmcore_transports.tcp import TcpTransport
from swarmcore_transports.tcp.addresses import endpoint_of
from swarmcore_transports.tcp.handshake import dialler_context, listener_context

pytestmark = pytest.mark.every_loop


@asynccontextmanager
async def impostor(handler, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Anything at all behind a port; yields ``//host:port``."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"//127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await reader.read(1)


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def _noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(bytes(range(256)) * 100)
    await reader.read()


@pytest.mark.parametrize(
    ("handler", "speaks_tls", "error"),
    [
        (_http, False, PeerIdentityError),
        (_hang_up, False, PeerUnreachableError),
        (_noise, True, UnavailableError),
    ],
)
async def test_what_answers_is_no_peer(handler, speaks_tls: bool, error: type[Exception]) -> None:
    identity = Identity.generate()
    context = listener_context(identity)[0] if speaks_tls else None
    dialler = TcpTransport(Identity.generate(), limits=Limits(connect_timeout=5))
    async with impostor(handler, context) as location:
        with pytest.raises(error):
            await dialler.open_stream(Address("tcp", location, identity.peer))
    await dialler.close()


async def test_a_silent_listener_is_given_up() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        dialler = TcpTransport(Identity.generate(), limits=Limits(connect_timeout=0.2))
        address = Address("tcp", f"//127.0.0.1:{silent.getsockname()[1]}", Identity.generate().peer)
        with pytest.raises(PeerUnreachableError, match=r"did not answer within 0\.2 s"):
            await dialler.open_stream(address)
        await dialler.close()


async def _tls_stranger(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    endpoint = endpoint_of(address)
    return await asyncio.open_connection(
        endpoint.host, endpoint.port, ssl=dialler_context(), server_hostname="", ssl_shutdown_timeout=1
    )


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(FrameType.PROOF, bytes(108)),
        encode_frame(FrameType.OPEN),
        encode_frame(FrameType.ABORT, b"never mind"),
        b"\xff" * 64,
        encode_frame(FrameType.MESSAGE, b"", 2**32 - 1),
    ],
)
async def test_a_dialler_without_a_proof_is_refused(frame: bytes) -> None:
    handled: list[Stream] = []

    async def handler(stream: Stream) -> None:
        handled.append(stream)

    async with listening(handler) as (listener, _, address):
        reader, writer = await _tls_stranger(address)
        await reader.readexactly(9 + 32)  # the hello begins
        writer.write(frame)
        assert await _to_the_end(reader)
        writer.close()
        assert not handled
        await settle(lambda: "0 connections" in repr(listener))


async def test_a_slow_dialler_is_dropped_at_the_deadline() -> None:
    async with listening(limits=Limits(connect_timeout=0.3)) as (_, dialler, address):
        reader, writer = await _tls_stranger(address)  # then never proves anything
        assert await _to_the_end(reader)
        writer.close()
        await round_trip(await dialler.open_stream(address))


async def test_of_those_that_prove_nothing_the_oldest_make_room() -> None:
    async with listening() as (listener, dialler, address):
        listener.resources = bounded(descriptors=Bounds(100, 50, unproven=4, protocol=100))
        endpoint = endpoint_of(address)
        idlers = [await asyncio.open_connection(endpoint.host, endpoint.port) for _ in range(5)]
        for reader, _ in idlers[:2]:  # strangers get three quarters of the bound
            assert await _to_the_end(reader)
        await round_trip(await dialler.open_stream(address))
        assert listener.resources.used(Resource.DESCRIPTORS, dialler.identity.peer) == 1
        for _, writer in idlers:
            writer.close()
        await settle(lambda: listener.resources.used(Resource.DESCRIPTORS) == 1)


async def test_idle_connections_make_room_and_those_in_use_do_not() -> None:
    async with listening() as (listener, dialler, address):
        listener.resources = bounded(descriptors=Bounds(4, 4, unproven=4, protocol=4))
        streams = [await dialler.open_stream(address) for _ in range(2)]
        for stream in streams:
            await round_trip(stream)
        others = [TcpTransport(Identity.generate()) for _ in range(4)]
        for other in others:
            stream = await other.open_stream(address)
            await round_trip(stream)
            await stream.close()
            await settle(lambda: listener._connections.idle)
        assert listener.resources.used(Resource.DESCRIPTORS) == 3
        for stream in streams:
            await round_trip(stream)
        await asyncio.gather(*(other.close() for other in others))


async def test_a_peer_with_too_many_connections_is_told_so() -> None:
    async with listening() as (listener, dialler, address):
        listener.resources = bounded(descriptors=Bounds(100, 2, unproven=50, protocol=100))
        streams = [await dialler.open_stream(address) for _ in range(2)]
        with pytest.raises(SwarmError, match="bound of 2"):
            await round_trip(await dialler.open_stream(address))
        for stream in streams:
            await round_trip(stream)


async def _to_the_end(reader: asyncio.StreamReader) -> bool:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass
    return True

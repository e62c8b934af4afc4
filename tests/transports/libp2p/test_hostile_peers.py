"""Peers that have proven who they are and then send what makes no sense: others go on being served."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import attrs
import pytest
import pytest_asyncio

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
from libp2p.abc import IHost, INetConn
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamError
from raw_libp2p import RawPeer, connect, cut, raw_peer

from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.host import PROTOCOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = Limits(connect_timeout=2.0, keepalive=1.0)
MULTISTREAM = b"\x13/multistream/1.0.0\n"
SERVED = (
    PROTOCOL,
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
    "/libp2p/circuit/relay/0.2.0/hop",
    "/libp2p/circuit/relay/0.2.0/stop",
    "/libp2p/dcutr",
    "/libp2p/autonat/1.0.0",
    "/ipfs/kad/1.0.0",
)


@attrs.frozen
class Listener:
    transport: Libp2pTransport
    address: Address
    stream: Stream
    """Of another peer, open all the time."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def listener() -> AsyncIterator[Listener]:
    async def echo(stream: Stream) -> None:
        while True:
            await stream.send(await stream.receive())

    listening = Libp2pTransport(Identity.generate(), limits=LIMITS, listen_on=["/ip4/127.0.0.1/tcp/0"])
    other = Libp2pTransport(Identity.generate(), limits=LIMITS)
    (address,) = await listening.listen(echo)
    yield Listener(listening, address, await other.open_stream(address))
    await other.close()
    await listening.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peer() -> AsyncIterator[RawPeer]:
    async with raw_peer() as peer:
        yield peer


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def say(connection: INetConn, *data: bytes, end: str = "reset") -> None:
    """Send ``data`` on a new stream, in pieces, before anything is agreed."""
    stream: Any = await connection.muxed_conn.open_stream()
    with suppress(MuxedStreamError):  # the other side has had enough of it
        for piece in data:
            await stream.write(piece)
            await trio.sleep(0.002)
    if end:
        await getattr(stream, end)()


async def frame(
    connection: INetConn, kind: int, flags: int, stream_id: int, length: int, body: bytes = b""
) -> None:
    """Send a frame of yamux."""
    muxed: Any = connection.muxed_conn
    await muxed.secured_conn.write(struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body)


async def open_and_reset(connection: INetConn) -> None:
    for _ in range(20):
        await say(connection, end="reset")


async def open_and_close(connection: INetConn) -> None:
    for _ in range(20):
        await say(connection, end="close")


async def no_multistream(connection: INetConn) -> None:
    for size in range(1, 200, 20):
        await say(connection, noise(size))


async def endless_length(connection: INetConn) -> None:
    await say(connection, b"\xff" * 30, end="")


async def gone_after_the_first_line(connection: INetConn) -> None:
    for _ in range(10):
        await say(connection, MULTISTREAM)


async def noise_after_the_first_line(connection: INetConn) -> None:
    await say(connection, MULTISTREAM, noise(100))


async def a_protocol_that_is_no_text(connection: INetConn) -> None:
    await say(connection, MULTISTREAM + b"\x06\xff\xfe\xfd\xfc\xfb\n", end="")


async def an_unknown_protocol(connection: INetConn) -> None:
    await say(connection, MULTISTREAM + b"\x0c/unheard/of\n", end="")


async def half_a_line(connection: INetConn) -> None:
    await say(connection, b"\x13/multistr", end="")


async def a_frame_of_noise(connection: INetConn) -> None:
    muxed: Any = connection.muxed_conn
    await muxed.secured_conn.write(noise(5000))


async def a_frame_of_another_version(connection: INetConn) -> None:
    muxed: Any = connection.muxed_conn
    await muxed.secured_conn.write(b"\x07\x09\xff\xff" + bytes(8))


async def data_of_no_stream(connection: INetConn) -> None:
    await frame(connection, 0, 0, 9999, 10, bytes(10))


async def streams_with_wrong_numbers(connection: INetConn) -> None:
    for stream_id in (0, 2, 4):
        await frame(connection, 1, 1, stream_id, 0)


async def all_flags(connection: INetConn) -> None:
    for flags in range(1, 16):
        await frame(connection, 1, flags, 101 + 2 * flags, 0)
        await frame(connection, 0, flags, 201 + 2 * flags, 3, b"abc")


async def an_endless_window(connection: INetConn) -> None:
    stream: Any = await connection.muxed_conn.open_stream()
    await frame(connection, 1, 0, stream.stream_id, 2**32 - 1)


async def an_enormous_frame(connection: INetConn) -> None:
    await frame(connection, 0, 1, 101, 2**32 - 1)


async def half_a_frame(connection: INetConn) -> None:
    await frame(connection, 0, 1, 101, 2**20, bytes(1000))


async def garbage_instead_of_encrypted_bytes(connection: INetConn) -> None:
    secured: Any = connection.muxed_conn.secured_conn  # type: ignore[attr-defined]
    await secured.conn.read_writer.read_write_closer.write(noise(3000))


ATTACKS: list[Callable[[INetConn], Awaitable[None]]] = [
    open_and_reset,
    open_and_close,
    no_multistream,
    endless_length,
    gone_after_the_first_line,
    noise_after_the_first_line,
    a_protocol_that_is_no_text,
    an_unknown_protocol,
    half_a_line,
    a_frame_of_noise,
    a_frame_of_another_version,
    data_of_no_stream,
    streams_with_wrong_numbers,
    all_flags,
    an_endless_window,
    an_enormous_frame,
    half_a_frame,
    garbage_instead_of_encrypted_bytes,
]


async def served(host: IHost, address: Address) -> None:
    """A new connection, a new stream, and the first frame that a listener sends on it."""
    connection: Any = await connect(host, address)
    stream = await connection.new_stream()
    await host.multiselect_client.select_one_of([PROTOCOL], MultiselectCommunicator(stream))  # type: ignore[attr-defined]
    assert await stream.read(1)
    await cut(connection)


async def still_serves(listener: Listener, peer: RawPeer) -> None:
    await listener.stream.send(b"are you there?")
    assert bytes(await listener.stream.receive()) == b"are you there?"
    await peer.run(served, listener.address)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_garbage_after_the_handshake(
    attack: Callable[[INetConn], Awaitable[None]], listener: Listener, peer: RawPeer
) -> None:
    async def go(host: IHost) -> None:
        connection = await connect(host, listener.address)
        await attack(connection)
        await trio.sleep(0.01)
        await cut(connection)

    await peer.run(go)
    await still_serves(listener, peer)


@pytest.mark.parametrize("protocol", SERVED)
async def test_garbage_to_each_protocol(protocol: str, listener: Listener, peer: RawPeer) -> None:
    async def go(host: IHost) -> None:
        connection: Any = await connect(host, listener.address)
        for payload in (b"", noise(5), b"\x05" + noise(5), b"\xff" * 40, noise(4000)):
            for end in ("reset", "close", "none"):
                stream = await connection.new_stream()
                try:
                    await host.multiselect_client.select_one_of(  # type: ignore[attr-defined]
                        [TProtocol(protocol)], MultiselectCommunicator(stream)
                    )
                except MultiselectClientError:
                    return  # it is not served at the moment
                with suppress(StreamError):  # the other side has had enough of it
                    await stream.write(payload)
                    await getattr(stream, end, trio.lowlevel.checkpoint)()
        await trio.sleep(0.01)
        await cut(connection)

    await peer.run(go)
    await still_serves(listener, peer)


async def test_what_is_dropped_is_logged_by_us_and_the_library_is_silent(
    listener: Listener, peer: RawPeer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def go(host: IHost) -> None:
        for attack in (a_protocol_that_is_no_text, a_frame_of_noise, an_enormous_frame, half_a_frame):
            connection = await connect(host, listener.address)
            await attack(connection)
            await trio.sleep(0.01)
            await cut(connection)

    with caplog.at_level(logging.DEBUG, "swarmcore_transports.libp2p"):
        await peer.run(go)
        await still_serves(listener, peer)
    assert capfd.readouterr().err == ""
    assert "a stream of" in caplog.text and "was dropped" in caplog.text
    # With --log-level debug the library is heard as well, and never above that level.
    library = "swarmcore_transports.libp2p.patches.host.library"
    said = [record for record in caplog.records if record.name == library]
    assert said and all(record.levelno == logging.DEBUG for record in said)
    ours = [record for record in caplog.records if record.name.startswith("swarmcore")]
    assert not [record for record in ours if record.levelno >= logging.WARNING]


async def test_streams_that_never_say_anything_are_dropped(listener: Listener, peer: RawPeer) -> None:
    async def go(host: IHost) -> list[Any]:
        connection: Any = await connect(host, listener.address)
        streams = [await connection.new_stream() for _ in range(30)]
        for stream in streams[:20]:
            await host.multiselect_client.select_one_of([PROTOCOL], MultiselectCommunicator(stream))  # type: ignore[attr-defined]
        return streams

    async def gone(host: IHost, streams: list[Any]) -> None:
        with trio.fail_after(2 * LIMITS.connect_timeout):
            for stream in streams:
                with pytest.raises(StreamError):
                    while True:
                        await stream.read(1000)

    streams = await peer.run(go)
    await still_serves(listener, peer)
    await peer.run(gone, streams)
    assert not listener.transport._handshaker.half_open

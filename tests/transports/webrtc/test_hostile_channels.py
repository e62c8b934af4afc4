"""Peers that are connected and misbehave, or are gone without a word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
from small_resources import bounded

from swarmcore.errors import ConnectionLostError
from swarmcore.identity import Identity
from swarmcore.resources import Bounds
from swarmcore.transport import Stream
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_peers import echo  # noqa: E402

from swarmcore_transports.framed.frames import (  # noqa: E402
    FrameType,
    Settings,
    encode_frame,
    message_header,
)
from swarmcore_transports.webrtc.channel_transport import ChannelTransport  # noqa: E402
from swarmcore_transports.webrtc.engine import DataChannel  # noqa: E402
from swarmcore_transports.webrtc.signalling.endpoints import MAX_IDLE, SignallingClientPool  # noqa: E402

LIMITS = Limits(max_message=2**20, max_calls_per_peer=4, keepalive=0.3, send_buffer=64 * 1024)


async def hold(stream: Stream) -> None:
    await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def pair(on_stream: Any = echo, limits: Limits = LIMITS) -> AsyncIterator[tuple[Any, Any, Any]]:
    """A listener, a peer that dials it, and the listener's address."""
    listener = webrtc.WebRtcTransport(Identity.generate(), limits=limits, listen_on=["127.0.0.1:0"])
    peer = webrtc.WebRtcTransport(Identity.generate(), limits=limits)
    try:
        [address] = await listener.listen(on_stream)
        yield listener, peer, address
    finally:
        await asyncio.gather(listener.close(), peer.close())


class Watch:
    """Uses a channel, and keeps what comes."""

    def __init__(self, channel: DataChannel) -> None:
        self.channel = channel
        self.got = bytearray()
        self.closed = asyncio.Event()
        channel.set_handler(self)

    def message_received(self, data: bytes) -> None:
        self.got += data

    def buffered_amount_low(self) -> None: ...

    def channel_closed(self) -> None:
        self.closed.set()


async def raw(peer: Any, address: Any) -> Watch:
    """A channel to ``address`` on which nothing has been said."""
    managed = peer._connector.connections.get(address.peer) or await peer._connector.dials.dial(
        address.peer, webrtc.transport.service_of(address)
    )
    return Watch(await managed.connection.open_channel())


HELLO = encode_frame(FrameType.HELLO, Settings.of(LIMITS).encode() + bytes(16))
OPENED = HELLO + encode_frame(FrameType.OPEN)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"garbage" * 100, b""),
        (encode_frame(FrameType.OPEN), b"instead of a hello"),
        (OPENED + message_header(LIMITS.max_message + 1), b"above the limit of 1048576"),
        (OPENED + (message_header(0) * 1000), b"more than it was granted"),
        (OPENED + (message_header(30_000) + bytes(30_000)) * 8, b"more than it was granted"),
    ],
)
async def test_what_breaks_the_rules_of_a_stream_ends_its_channel(said: bytes, reason: bytes) -> None:
    async with pair(hold) as (_, peer, address):
        channel = await raw(peer, address)
        for start in range(0, len(said), 16 * 1024):
            channel.channel.send(said[start : start + 16 * 1024])
        async with asyncio.timeout(5):
            await channel.closed.wait()
        assert reason in channel.got
        stream = await peer.open_stream(address)  # the connection lives
        stream.abort("done")


async def test_text_ends_a_channel() -> None:
    async with pair() as (_, peer, address):
        channel = await raw(peer, address)
        channel.channel._channel.send("text")  # type: ignore[attr-defined]
        async with asyncio.timeout(5):
            await channel.closed.wait()


async def test_a_peer_opens_no_more_channels_than_its_share() -> None:
    async with pair() as (listener, peer, address):
        channels = [await raw(peer, address) for _ in range(2 * LIMITS.max_calls_per_peer + 3)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(channel.closed.wait() for channel in channels[-3:]))
        assert listener._connector.connections.refused_channels == 3
        assert not any(channel.closed.is_set() for channel in channels[:-3])


async def test_a_channel_on_which_nothing_is_said_is_hung_up_on() -> None:
    limits = attrs.evolve(LIMITS, connect_timeout=2.0, keepalive=60.0)
    async with pair(limits=limits) as (listener, peer, address):
        channels = [await raw(peer, address) for _ in range(3)]
        assert listener._handshaker.half_open
        async with asyncio.timeout(20):
            await asyncio.gather(*(channel.closed.wait() for channel in channels))
        assert not listener._handshaker.half_open
        [managed] = listener._connector.connections._all
        assert not managed.channels
        stream = await peer.open_stream(address)  # the connection lives
        await stream.send(b"there and back")
        assert bytes(await stream.receive()) == b"there and back"


async def test_of_channels_on_which_nothing_is_said_the_oldest_makes_room() -> None:
    limits = attrs.evolve(LIMITS, connect_timeout=60.0, keepalive=60.0)
    async with pair(limits=limits) as (listener, peer, address):
        listener.resources = bounded(connections=Bounds(100, 3, unproven=3, protocol=100))
        silent = [await raw(peer, address) for _ in range(4)]
        async with asyncio.timeout(5):
            await silent[0].closed.wait()
        assert listener._handshaker.half_open == 3
        assert not any(channel.closed.is_set() for channel in silent[1:])
        stream = await peer.open_stream(address)
        await stream.send(b"there and back")
        assert bytes(await stream.receive()) == b"there and back"


async def test_a_peer_that_falls_silent_is_lost_with_all_its_channels() -> None:
    async with pair() as (listener, peer, address):
        streams = [await peer.open_stream(address) for _ in range(3)]
        [managed] = listener._connector.connections._all
        mute(managed.connection)
        async with asyncio.timeout(10):
            for stream in streams:
                with pytest.raises(ConnectionLostError):
                    await stream.receive()
        assert not len(peer._connector.connections)


async def test_a_peer_whose_link_went_dead_is_dialled_anew() -> None:
    async with pair() as (listener, peer, address):
        first = await peer.open_stream(address)
        before = peer._connector.connections.get(address.peer)
        [managed] = listener._connector.connections._all
        mute(managed.connection)
        stream = await peer.open_stream(address)
        await stream.send(b"again")
        assert bytes(await stream.receive()) == b"again"
        assert peer._connector.connections.get(address.peer) is not before
        with pytest.raises(ConnectionLostError):
            await first.receive()


def mute(connection: Any) -> None:
    """Nothing that it sends leaves any more, and nothing that comes is heard."""

    async def nothing(*_: object) -> None: ...

    sctp = connection._connection.sctp
    sctp.transport._send_data = nothing
    sctp._handle_data = nothing


async def test_a_peer_that_ends_its_connection_is_let_go_at_once() -> None:
    async with pair(limits=Limits(keepalive=60.0)) as (listener, peer, address):
        stream = await peer.open_stream(address)
        [managed] = listener._connector.connections._all
        await managed.connection.close()
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionLostError):
                await stream.receive()


class Channel(DataChannel):
    """One that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    @property
    def buffered_amount(self) -> int:
        return 0

    def set_low_threshold(self, amount: int) -> None: ...

    def send(self, data: bytes) -> None: ...

    def close(self) -> None:
        self.ended = True


async def test_what_comes_while_reading_is_paused_is_bounded() -> None:
    channel, ended = Channel(), []
    pipe = ChannelTransport(channel, "direct", ended.append)
    piece = bytes(2**16)
    for _ in range(300):
        pipe.message_received(piece)
    assert channel.ended and ended == [pipe]
    assert not pipe._undelivered


async def test_what_comes_before_a_channel_is_used_is_bounded() -> None:
    channel = Channel()
    for _ in range(1000):
        channel._message(b"early")
    assert channel.ended and len(channel._early) <= 64


class _Client:
    def __init__(self) -> None:
        self.running = False

    async def run(self) -> None:
        self.running = True
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.running = False


@pytest.mark.virtual_time
async def test_clients_of_services_are_closed_when_unused_and_bounded_in_number() -> None:
    make: Callable[[Any], Any] = lambda service, own: _Client()  # noqa: E731
    clients = SignallingClientPool(make)
    kept = clients.keep("kept")  # type: ignore[arg-type]
    with clients.using("used") as used:  # type: ignore[arg-type]
        for number in range(MAX_IDLE + 5):
            with clients.using(str(number)):  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
        assert len(clients) == MAX_IDLE + 2
        await asyncio.sleep(200.0)
        assert len(clients) == 2
    await asyncio.sleep(200.0)
    assert (kept.running, used.running, len(clients)) == (True, False, 1)  # type: ignore[attr-defined]
    await clients.close()
    assert not kept.running  # type: ignore[attr-defined]

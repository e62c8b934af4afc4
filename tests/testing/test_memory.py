"""The in-memory transport keeps the transport contract, without threads and without time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import attrs
import pytest

from swarmcore.errors import (
    AddressInUseError,
    ConnectionLostError,
    MessageTooLargeError,
    PeerIdentityError,
    PeerUnreachableError,
    StreamAbortedError,
    StreamClosedError,
)
from swarmcore.identity import Identity
from swarmcore.testing import MemoryNetwork, MemoryTransport
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits

pytestmark = pytest.mark.virtual_time

LIMITS = Limits(max_message=10_000, send_buffer=1000)


class Pair:
    """A connected pair of streams and what they belong to."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        self.listener = network.transport(Identity.generate(), LIMITS)
        self.dialler = network.transport(Identity.generate(), LIMITS, listen=False)
        self.network = network
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()
        self.release = asyncio.Event()

    async def connect(self) -> None:
        (self.address,) = await self.listener.listen(self._hold)
        self.near = await self.dialler.open_stream(self.address)
        self.far = await self.accepted.get()

    async def _hold(self, stream: Stream) -> None:
        self.accepted.put_nowait(stream)
        await self.release.wait()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.connect()
    yield pair
    await pair.dialler.close()
    await pair.listener.close()


async def test_both_ends_know_who_is_there(pair: Pair) -> None:
    assert pair.near.remote == pair.listener.identity.peer == pair.address.peer
    assert pair.far.remote == pair.dialler.identity.peer
    assert pair.near.path == "direct"
    assert Address.parse(str(pair.address)) == pair.address


async def test_a_message_is_the_join_of_its_buffers_and_owned_by_its_receiver(pair: Pair) -> None:
    mine = bytearray(b"abc")
    await pair.near.send(b"<", mine, memoryview(b">"))
    mine[:] = b"xyz"
    received = await pair.far.receive()
    assert bytes(received) == b"<abc>"
    received[0] = 0  # writable, and nobody else sees it
    assert mine == b"xyz"


async def test_empty_messages_arrive_and_are_bounded(pair: Pair) -> None:
    sent = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            while True:
                await pair.near.send()
                sent += 1
    assert 0 < sent < 20
    assert bytes(await pair.far.receive()) == b""


async def test_send_waits_for_a_slow_reader(pair: Pair) -> None:
    await pair.near.send(bytes(900))
    blocked = asyncio.create_task(pair.near.send(bytes(100)))
    await asyncio.sleep(1)
    assert not blocked.done()
    await pair.far.receive()
    await blocked
    assert len(await pair.far.receive()) == 100


async def test_a_cancelled_send_sends_nothing_and_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    await pair.near.send(bytes(900))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pair.near.send(b"never" * 50), 1)
    await pair.far.receive()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pair.far.receive(), 1)
    await pair.near.send(b"later")
    assert bytes(await pair.far.receive()) == b"later"


async def test_a_message_above_the_buffer_passes_and_above_the_limit_is_refused(pair: Pair) -> None:
    await pair.near.send(bytes(5000))
    with pytest.raises(MessageTooLargeError, match="10001 bytes"):
        await pair.near.send(bytes(10_001))
    assert len(await pair.far.receive()) == 5000


async def test_half_close(pair: Pair) -> None:
    await pair.near.send(b"last")
    await pair.near.end()
    with pytest.raises(StreamClosedError):
        await pair.near.send(b"more")
    assert bytes(await pair.far.receive()) == b"last"
    with pytest.raises(StreamClosedError):
        await pair.far.receive()
    await pair.far.send(b"answer")
    assert bytes(await pair.near.receive()) == b"answer"


async def test_close_delivers_what_was_sent_and_wakes_a_blocked_sender(pair: Pair) -> None:
    await pair.far.send(bytes(900))
    blocked = asyncio.create_task(pair.far.send(bytes(900)))
    await asyncio.sleep(0)
    await pair.near.send(b"last")
    await pair.near.close()
    await pair.near.close()
    with pytest.raises(StreamClosedError):
        await blocked
    assert bytes(await pair.far.receive()) == b"last"
    with pytest.raises(StreamClosedError):
        await pair.near.receive()
    pair.near.abort("too late to take anything back")


async def test_abort_reaches_a_waiting_receiver_with_its_reason_cut(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.far.receive())
    await asyncio.sleep(0)
    await pair.near.send(b"dropped")
    pair.near.abort("because" * 100)
    with pytest.raises(StreamAbortedError, match="because") as raised:
        await waiting
    assert len(raised.value.message) == 200
    with pytest.raises(StreamAbortedError):
        await pair.far.send(b"")
    with pytest.raises(StreamClosedError):
        await pair.near.receive()


async def test_the_stream_is_closed_when_its_handler_returns(pair: Pair) -> None:
    pair.release.set()
    with pytest.raises(StreamClosedError):
        await pair.near.receive()


async def test_a_failing_handler_aborts_its_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_stream: Stream) -> None:
        raise ValueError("not the caller's business")

    network = MemoryNetwork()
    listener = network.transport(Identity.generate())
    (address,) = await listener.listen(fail)
    stream = await network.transport(Identity.generate()).open_stream(address)
    with pytest.raises(StreamAbortedError) as raised:
        await stream.receive()
    assert "business" not in raised.value.message
    assert "not the caller's business" in caplog.text
    await listener.close()


async def test_a_handler_that_lost_another_peer_passes_the_reason_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_stream: Stream) -> None:
        raise PeerUnreachableError("the next stage is gone")

    network = MemoryNetwork()
    listener = network.transport(Identity.generate())
    (address,) = await listener.listen(fail)
    stream = await network.transport(Identity.generate()).open_stream(address)
    with pytest.raises(StreamAbortedError, match="the next stage is gone"):
        await stream.receive()
    assert not caplog.records
    await listener.close()


async def test_a_closed_transport_aborts_its_streams_and_answers_nobody(pair: Pair) -> None:
    await pair.listener.close()
    await pair.listener.close()
    with pytest.raises(StreamAbortedError):
        await pair.near.receive()
    with pytest.raises(PeerUnreachableError):
        await pair.dialler.open_stream(pair.address)
    assert repr(pair.network) == "<MemoryNetwork 0 listening>"
    await pair.dialler.close()
    with pytest.raises(StreamClosedError):
        await pair.dialler.open_stream(pair.address)


async def test_a_crash_looks_like_a_lost_connection(pair: Pair) -> None:
    await pair.listener.crash()
    with pytest.raises(ConnectionLostError):
        await pair.near.receive()
    with pytest.raises(PeerUnreachableError):
        await pair.dialler.open_stream(pair.address)


async def test_the_wrong_peer_is_refused(pair: Pair) -> None:
    with pytest.raises(PeerIdentityError):
        await pair.dialler.open_stream(attrs.evolve(pair.address, peer=Identity.generate().peer))


async def test_a_place_is_taken_once(pair: Pair) -> None:
    second = MemoryTransport(
        Identity.generate(), network=pair.network, listen_on=[pair.address.location.removeprefix("//")]
    )
    with pytest.raises(AddressInUseError):
        await second.listen(pair._hold)


async def test_announced_places_replace_those_listened_on(pair: Pair) -> None:
    transport = MemoryTransport(
        Identity.generate(), network=pair.network, listen_on=["inside"], announce=["outside"]
    )
    (address,) = await transport.listen(pair._hold)
    assert address.location == "//outside"
    await transport.close()

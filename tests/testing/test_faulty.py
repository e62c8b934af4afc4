"""Faults happen on the loop's clock, by the seed, and are survivable."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from random import Random

import pytest

from swarmcore.errors import (
    ConnectionLostError,
    PeerUnreachableError,
    ProtocolError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.rpc import Caller, Method, Node
from swarmcore.testing import Faults, FaultyTransport, MemoryNetwork
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import PING, Ping, Pong

pytestmark = pytest.mark.virtual_time

LIMITS = Limits(max_message=100_000, send_buffer=10_000, keepalive=3.0, connect_timeout=10.0)


def now() -> float:
    return asyncio.get_running_loop().time()


class Lab:
    """Two faulty transports on one network; the second one hands over the streams it accepts."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.near = self.faulty(seed=1)
        self.far = self.faulty(seed=2)
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()
        self.address: Address

    def faulty(self, seed: int) -> FaultyTransport:
        return FaultyTransport(self.network.transport(Identity.generate(), LIMITS), Random(seed))

    async def streams(self) -> tuple[Stream, Stream]:
        return await self.near.open_stream(self.address), await self.accepted.get()

    async def hold(self, stream: Stream) -> None:
        self.accepted.put_nowait(stream)
        await asyncio.Event().wait()


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    lab = Lab()
    (lab.address,) = await lab.far.listen(lab.hold)
    yield lab
    await lab.near.close()
    await lab.far.close()


async def test_without_faults_it_is_the_transport_it_wraps(lab: Lab) -> None:
    near, far = await lab.streams()
    assert lab.near.scheme == "memory"
    await near.send(b"one", b" message")
    assert bytes(await far.receive()) == b"one message"
    await far.send(b"answer")
    await far.end()
    assert bytes(await near.receive()) == b"answer"
    with pytest.raises(StreamClosedError):
        await near.receive()
    with pytest.raises(StreamClosedError):
        await far.send(b"")
    near.abort("done")
    with pytest.raises(StreamAbortedError, match="done"):
        await far.receive()
    with pytest.raises(StreamClosedError):
        await near.receive()
    assert now() == 0.0


async def test_delay_is_one_way_and_messages_overlap(lab: Lab) -> None:
    lab.near.faults = Faults(delay=0.5)
    near, far = await lab.streams()
    assert now() == pytest.approx(1.0), "dialling is a round trip"
    for number in range(10):
        await near.send(bytes([number]))
    assert now() == pytest.approx(1.0)
    for number in range(10):
        assert bytes(await far.receive()) == bytes([number])
    assert now() == pytest.approx(1.5)


async def test_jitter_varies_by_the_seed_and_keeps_order(lab: Lab) -> None:
    async def times_of_arrival(seed: int) -> list[float]:
        lab.near._random = Random(seed)
        near, far = await lab.streams()
        start, times = now(), []

        async def receive_all() -> None:
            for number in range(20):
                assert bytes(await far.receive()) == bytes([number])
                times.append(round(now() - start, 9))

        receiver = asyncio.create_task(receive_all())
        for number in range(20):
            await near.send(bytes([number]))
            await asyncio.sleep(0.05)
        await receiver
        return times

    lab.near.faults = Faults(delay=0.1, jitter=0.2)
    first, again, other = [await times_of_arrival(seed) for seed in (7, 7, 8)]
    assert first == again != other
    assert len({b - a for a, b in itertools.pairwise(first)}) > 5


async def test_rate_is_shared_by_the_streams_to_a_peer_and_pushes_back(lab: Lab) -> None:
    lab.near.faults = Faults(rate=1000.0)
    (near, far), (near2, far2) = await lab.streams(), await lab.streams()
    await near.send(bytes(5000))
    await near2.send(bytes(5000))
    await far.receive()
    assert now() == pytest.approx(5.0)
    await far2.receive()
    assert now() == pytest.approx(10.0)
    await near.send(bytes(8000))
    await near.send(bytes(8000))  # above send_buffer together: waits until the first is through
    assert now() == pytest.approx(18.0)


async def test_close_delivers_what_is_under_way(lab: Lab) -> None:
    lab.near.faults = Faults(delay=1.0)
    near, far = await lab.streams()
    await near.send(b"last words")
    await near.close()
    assert bytes(await far.receive()) == b"last words"
    with pytest.raises(StreamClosedError):
        await far.receive()
    with pytest.raises(StreamClosedError):
        await near.receive()


async def test_lost_connections(lab: Lab) -> None:
    lab.near.faults = Faults(loss=0.1)
    sent = 0
    with pytest.raises(ConnectionLostError):
        near, far = await lab.streams()
        while True:
            await near.send(b"x")
            sent += 1
    assert 0 < sent < 100
    with pytest.raises(ConnectionLostError):
        while True:
            await far.receive()
    near, far = await lab.streams()
    lab.near.break_connections(lab.far.identity.peer)
    for stream in near, far:
        with pytest.raises(ConnectionLostError):
            await stream.receive()


async def test_a_short_partition_holds_messages_back_in_both_directions(lab: Lab) -> None:
    near, far = await lab.streams()
    lab.near.partition(lab.far.identity.peer)
    await near.send(b"there")
    await far.send(b"back")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(far.receive(), 2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(near.receive(), 2)
    assert "1 peers cut off" in repr(lab.near)
    lab.near.heal()
    assert bytes(await far.receive()) == b"there"
    assert bytes(await near.receive()) == b"back"


async def test_a_long_partition_loses_streams_after_three_keepalives(lab: Lab) -> None:
    near, far = await lab.streams()
    lab.near.partition()
    near.abort("nobody hears this")
    with pytest.raises(ConnectionLostError):
        await far.receive()
    assert now() == pytest.approx(9.0)
    with pytest.raises(PeerUnreachableError):
        await lab.near.open_stream(lab.address)
    assert now() == pytest.approx(19.0)
    lab.near.heal()
    near, far = await lab.streams()
    await near.send(b"again")
    assert bytes(await far.receive()) == b"again"


async def test_a_partition_is_per_peer(lab: Lab) -> None:
    other = lab.faulty(seed=3)
    (other_address,) = await other.listen(lab.hold)
    lab.near.partition(lab.far.identity.peer)
    stream = await lab.near.open_stream(other_address)
    await stream.send(b"passes")
    assert bytes(await (await lab.accepted.get()).receive()) == b"passes"
    # What the cut-off peer opens is silent, then lost.
    (near_address,) = await lab.near.listen(lab.hold)
    opened = await lab.far.open_stream(near_address)
    with pytest.raises(ConnectionLostError):
        await opened.receive()
    assert now() == pytest.approx(9.0)
    await other.close()


async def test_corruption_flips_one_bit(lab: Lab) -> None:
    lab.near.faults = Faults(corruption=1.0)
    near, far = await lab.streams()
    await near.send(bytes(100))
    assert sum(byte.bit_count() for byte in await far.receive()) == 1


async def test_calls_survive_every_fault(lab: Lab) -> None:
    """Whatever happens to messages, a call returns the right answer or raises a `SwarmError`, in time."""
    outcomes: dict[str, int] = {}

    async def pong(ping: Ping, _caller: Caller) -> Pong:
        return Pong(ping.payload)

    ping = Method(PING, Ping, Pong)
    near = Node(lab.near.identity, [lab.near], limits=LIMITS)
    far_transport = lab.faulty(seed=4)
    far = Node(far_transport.identity, [far_transport], limits=LIMITS)
    far.serve(ping, pong)
    await far.start()
    for transport in lab.near, far_transport:
        transport.faults = Faults(delay=0.05, jitter=0.02, rate=1e6, loss=0.1, corruption=0.3)

    async def call(number: int) -> None:
        started = now()
        try:
            reply = await near.call(far.addresses, ping, Ping(b"%d" % number), timeout=5.0)
            outcome = "right" if reply.payload == b"%d" % number else "corrupted"
        except SwarmError as exc:
            outcome = type(exc).__name__
        assert now() - started <= 6.0
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    await asyncio.gather(*(call(number) for number in range(200)))
    assert outcomes["right"] > 50
    assert outcomes[ConnectionLostError.__name__] > 5
    assert outcomes[ProtocolError.__name__] > 5
    await near.close()
    await far.close()
    assert repr(far).endswith("0 calls in 0 out>")

"""Connections of both WebRTC engines, of one kind and between the two, without the transport above them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_engines import ENGINES, Messages, Pair, pair

from swarmcore_transports.webrtc.engine import Engine

Engines = tuple[Engine, Engine]

PIECES = [1, 2, 1200, 16 * 1024, 32 * 1024, 64 * 1024]
"""Lengths of messages, up to the longest that the protocol has."""


@pytest.fixture(params=[(a, b) for a in ENGINES for b in ENGINES], ids=lambda both: "-".join(both))
def engines(request: pytest.FixtureRequest) -> Engines:
    both: Engines = request.param
    return both


@asynccontextmanager
async def connected(engines: Engines) -> AsyncIterator[Pair]:
    async with pair(*engines) as found:
        await found.connect()
        yield found


def numbered(count: int, seed: int) -> list[bytes]:
    """Messages of all lengths, no two of them alike."""
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice(PIECES)) for _ in range(count)]


async def carried(sender: Messages, receiver: Messages, messages: list[bytes]) -> None:
    """Send them, and compare what comes."""
    for message in messages:
        sender.channel.send(message)
    for message in messages:
        assert await receiver.next() == message


async def test_both_sides_open_channels_on_which_messages_keep_their_order(engines: Engines) -> None:
    async with connected(engines) as found:
        sides = found.dialler, found.listener
        opened = await asyncio.gather(*(found.channel(side) for side in sides))
        [(a, b), (c, d)] = opened
        both_ways = [(a, b), (b, a), (c, d), (d, c)]
        await asyncio.gather(*(carried(*ends, numbered(40, seed)) for seed, ends in enumerate(both_ways)))
        for end, other in opened:
            end.channel.close()
            end.channel.close()
            await other.closed.wait()
        assert not any(event.is_set() for event in found.lost.values())


async def test_what_waits_is_told_and_leaves_when_it_can(engines: Engines) -> None:
    """More than either library takes at once."""
    async with connected(engines) as found:
        sender, receiver = await found.channel(found.dialler)
        messages = [bytes([number]) * PIECES[-1] for number in range(200)]
        sender.channel.set_low(PIECES[-1])
        for message in messages:
            sender.channel.send(message)
        assert sender.channel.queued > 8 * 2**20
        for message in messages:
            assert await receiver.next() == message
        await sender.low.wait()
        assert sender.channel.queued <= PIECES[-1]


async def test_what_was_sent_before_the_end_of_a_channel_arrives(engines: Engines) -> None:
    async with connected(engines) as found:
        for opener in (found.dialler, found.listener):
            sender, receiver = await found.channel(opener)
            messages = numbered(100, 1)
            for message in messages:
                sender.channel.send(message)
            sender.channel.close()
            sender.channel.send(b"too late")
            for message in messages:
                assert await receiver.next() == message
            await receiver.closed.wait()


async def test_the_first_channel_is_there_at_once_and_keeps_what_comes_early(engines: Engines) -> None:
    async with connected(engines) as found:
        messages = numbered(20, 1)
        for message in messages:
            found.dialler.signals.send(message)
        probe, probed = await found.channel(found.dialler)
        await carried(probe, probed, [b"behind"])
        dialler, listener = Messages(found.dialler.signals), Messages(found.listener.signals)
        for message in messages:
            assert await listener.next() == message
        await asyncio.gather(
            carried(dialler, listener, numbered(20, 2)), carried(listener, dialler, numbered(20, 3))
        )


class Traffic:
    """Messages without end from ``sender``, each of which has to come to ``receiver`` in its turn.

    As with the credit of streams, not more than `WINDOW` are under way.
    """

    WINDOW = 20

    def __init__(self, sender: Messages, receiver: Messages, seed: int) -> None:
        self._ends = sender, receiver
        self._seed = seed
        self._sent = 0
        self._enough = False
        self.arrived = 0
        self._credit = asyncio.Semaphore(self.WINDOW)
        self.progress = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`, and then until all that was sent has come."""
        await asyncio.gather(self._send(), self._receive())
        assert self.arrived == self._sent

    def stop(self) -> None:
        self._enough = True

    async def further(self) -> None:
        """Wait until more has come than now."""
        self.progress.clear()
        await self.progress.wait()

    async def _send(self) -> None:
        sender, rng = self._ends[0], random.Random(self._seed)
        while not self._enough:
            await self._credit.acquire()
            sender.channel.send(rng.randbytes(rng.choice(PIECES)))
            self._sent += 1
        sender.channel.send(b"the end")

    async def _receive(self) -> None:
        receiver, rng = self._ends[1], random.Random(self._seed)
        while (message := await receiver.next()) != b"the end":
            assert message == rng.randbytes(rng.choice(PIECES))
            self.arrived += 1
            self._credit.release()
            self.progress.set()


async def test_a_restart_in_the_midst_of_traffic_loses_nothing(engines: Engines) -> None:
    async with connected(engines) as found:
        a, b = await found.channel(found.dialler)
        c, d = await found.channel(found.listener)
        flows = [Traffic(*ends, seed) for seed, ends in enumerate([(a, b), (b, a), (c, d), (d, c)])]
        running = asyncio.gather(*(flow.run() for flow in flows))
        for _ in range(3):
            await asyncio.gather(*(flow.further() for flow in flows))
            await found.restart()
            await found.moved[found.listener].wait()
            await asyncio.gather(*(flow.further() for flow in flows))
        for flow in flows:
            flow.stop()
        await running
        assert found.dialler.path == found.listener.path == "direct"
        e, f = await found.channel(found.listener)
        await carried(e, f, numbered(10, 1))
        assert not any(event.is_set() for event in found.lost.values())

"""Two connections of aiortc's engine, without the transport above them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_engines import Messages, Pair, pair

PIECES = [1, 2, 1200, 16 * 1024, 32 * 1024, 64 * 1024]
"""Lengths of messages, up to the longest that the protocol has."""


@asynccontextmanager
async def connected() -> AsyncIterator[Pair]:
    async with pair() as found:
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


async def test_both_sides_open_channels_on_which_messages_keep_their_order() -> None:
    async with connected() as found:
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


async def test_what_waits_is_told_and_leaves_when_it_can() -> None:
    """More than the library takes at once."""
    async with connected() as found:
        sender, receiver = await found.channel(found.dialler)
        messages = [bytes([number]) * PIECES[-1] for number in range(200)]
        sender.channel.set_low_threshold(PIECES[-1])
        for message in messages:
            sender.channel.send(message)
        assert sender.channel.buffered_amount > 8 * 2**20
        for message in messages:
            assert await receiver.next() == message
        await sender.low.wait()
        assert sender.channel.buffered_amount <= PIECES[-1]


async def test_what_was_sent_before_the_end_of_a_channel_arrives() -> None:
    async with connected() as found:
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


async def test_the_first_channel_is_there_at_once_and_keeps_what_comes_early() -> None:
    async with connected() as found:
        messages = numbered(20, 1)
        for message in messages:
            found.dialler.signalling_channel.send(message)
        probe, probed = await found.channel(found.dialler)
        await carried(probe, probed, [b"behind"])
        dialler, listener = (
            Messages(found.dialler.signalling_channel),
            Messages(found.listener.signalling_channel),
        )
        for message in messages:
            assert await listener.next() == message
        await asyncio.gather(
            carried(dialler, listener, numbered(20, 2)), carried(listener, dialler, numbered(20, 3))
        )


class Traffic:
    """Messages without end over one channel, there and back: `WINDOW` are under way until `stop`."""

    WINDOW = 20

    def __init__(self, near: Messages, far: Messages, seed: int) -> None:
        self._near, self._far = near, far
        self._seed = seed
        self._underway = asyncio.Semaphore(self.WINDOW)
        self._sent = self._back = 0
        self._enough = False
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Until all has come back that was sent, in its order."""
        echo = asyncio.create_task(self._echo())
        await asyncio.gather(self._send(), self._receive())
        await echo

    def stop(self) -> None:
        self._enough = True

    async def further(self) -> None:
        """Wait until everything that is under way now has come back."""
        until = self._sent + 1
        while self._back < until:
            self._progress.clear()
            await self._progress.wait()

    def _messages(self) -> Iterator[bytes]:
        rng = random.Random(self._seed)
        while True:
            yield rng.randbytes(rng.choice(PIECES))

    async def _send(self) -> None:
        for message in self._messages():
            if self._enough:
                break
            await self._underway.acquire()
            self._near.channel.send(message)
            self._sent += 1
        self._near.channel.send(b"the end")

    async def _echo(self) -> None:
        message = b""
        while message != b"the end":
            message = await self._far.next()
            self._far.channel.send(message)

    async def _receive(self) -> None:
        expected = self._messages()
        while (message := await self._near.next()) != b"the end":
            assert message == next(expected)
            self._back += 1
            self._underway.release()
            self._progress.set()
        assert self._back == self._sent


async def test_a_restart_in_the_midst_of_traffic_loses_nothing() -> None:
    async with connected() as found:
        a, b = await found.channel(found.dialler)
        c, d = await found.channel(found.listener)
        flows = [Traffic(a, b, 1), Traffic(c, d, 2)]
        running = asyncio.gather(*(flow.run() for flow in flows))
        for _ in range(3):
            await asyncio.gather(*(flow.further() for flow in flows))
            await found.restart()
            await asyncio.gather(*(event.wait() for event in found.moved.values()))
            await asyncio.gather(*(flow.further() for flow in flows))
        for flow in flows:
            flow.stop()
        await running
        assert found.dialler.path == found.listener.path == "direct"
        e, f = await found.channel(found.listener)
        await carried(e, f, numbered(10, 1))
        assert not any(event.is_set() for event in found.lost.values())

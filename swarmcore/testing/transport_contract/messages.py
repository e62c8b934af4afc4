"""Messages: whole, in order, of any size, and no faster than they are read."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest

from swarmcore.errors import MessageTooLargeError, StreamClosedError
from swarmcore.testing.transport_contract.harness import Flood, TransportHarness, finish, pattern, receive
from swarmcore.transport import Stream


class MessagesContract(TransportHarness):
    async def test_names_both_peers(self) -> None:
        async with self.pair() as pair:
            near, far = await pair.connect()
            assert near.remote == pair.listener.identity.peer
            assert far.remote == pair.dialler.identity.peer
            assert near.path in ("direct", "hole-punched", "relayed")

    async def test_messages_arrive_whole_and_in_order_both_ways(self) -> None:
        sizes = [random.Random(1).choice([0, 1, 5, 200, 4096, 20_000, 70_000]) for _ in range(200)]
        messages = [pattern(size, seed) for seed, size in enumerate(sizes)]
        async with self.streams() as (near, far):
            received = await asyncio.gather(
                _receive_all(near), _receive_all(far), _send_all(near, messages), _send_all(far, messages)
            )
            assert received[0] == messages
            assert received[1] == messages

    async def test_empty_messages_are_messages(self) -> None:
        async with self.streams() as (near, far):
            await near.send()
            await near.send(b"")
            await near.send(b"", b"x", b"")
            assert [bytes(await far.receive()) for _ in range(3)] == [b"", b"", b"x"]

    async def test_a_message_is_the_concatenation_of_its_buffers(self) -> None:
        body = pattern(300_000)
        async with self.streams() as (near, far):
            sending = asyncio.create_task(
                near.send(
                    b"head", bytearray(b"er"), memoryview(body)[:100_001], b"", memoryview(body)[100_001:]
                )
            )
            assert await receive(far) == b"header" + body
            await sending

    async def test_buffers_may_be_reused_after_send(self) -> None:
        small, big = bytearray(pattern(1000)), bytearray(pattern(200_000))
        async with self.streams() as (near, far):
            await near.send(small)
            small[:] = bytes(len(small))
            await near.send(big)
            big[:] = bytes(len(big))
            assert await receive(far) == pattern(1000)
            assert await receive(far) == pattern(200_000)

    async def test_the_receiver_owns_what_it_receives(self) -> None:
        async with self.streams() as (near, far):
            for message in (b"first", b"other"):
                await near.send(message)
            first = await far.receive()
            assert not first.readonly and first.format == "B" and first.contiguous
            first[:] = b"?????"
            assert await receive(far) == b"other"
            assert bytes(first) == b"?????"

    async def test_big_messages_cross_each_other(self) -> None:
        size = self.limits.max_message
        assert size > 4 * self.limits.send_buffer
        async with self.streams() as (near, far):
            _, _, at_far, at_near = await asyncio.gather(
                near.send(pattern(size, 1)), far.send(pattern(size, 2)), far.receive(), near.receive()
            )
            assert at_far == pattern(size, 1)
            assert at_near == pattern(size, 2)

    async def test_a_message_above_the_limit_is_refused_and_the_stream_stays_usable(self) -> None:
        limits = attrs.evolve(self.limits, max_message=100_000)
        async with self.pair(limits) as pair:
            near, far = await pair.connect()
            with pytest.raises(MessageTooLargeError):
                await near.send(bytes(60_000), bytes(40_001))
            sending = asyncio.create_task(near.send(pattern(100_000)))
            assert await receive(far) == pattern(100_000)
            await sending

    async def test_a_slow_reader_makes_send_wait(self) -> None:
        bound = self.limits.send_buffer + self.slack
        async with self.streams() as (near, far):
            flood = Flood(near, 2 * bound)
            await flood.stalled()
            assert flood.accepted <= bound
            assert not flood.task.done()
            for index in range(flood.count):
                assert await receive(far) == flood.message(index)
            await flood.task

    async def test_a_stalled_stream_does_not_stop_another(self) -> None:
        async with self.pair() as pair:
            stalled, _ = await pair.connect()
            flood = Flood(stalled, 2 * (self.limits.send_buffer + self.slack))
            await flood.stalled()
            near, far = await pair.connect()
            for seed in range(50):
                await near.send(pattern(20_000, seed))
                await far.send(await far.receive())
                assert await receive(near) == pattern(20_000, seed)
            assert not flood.task.done()
            await finish(flood.task)


async def _send_all(stream: Stream, messages: list[bytes]) -> None:
    for message in messages:
        await stream.send(message)
    await stream.end()


async def _receive_all(stream: Stream) -> list[bytes]:
    messages = []
    try:
        while True:
            messages.append(bytes(await stream.receive()))
    except StreamClosedError:
        return messages

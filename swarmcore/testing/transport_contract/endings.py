"""How streams end: half-close, close, abort, and what every call says afterwards."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import StreamAbortedError, StreamClosedError, UnavailableError
from swarmcore.testing.transport_contract.harness import Flood, TransportHarness, pattern, receive
from swarmcore.transport import Stream

PROMPT = 10.0
"""Seconds within which `close` has to return even when the other side does nothing."""


class EndingsContract(TransportHarness):
    async def test_half_close(self) -> None:
        async with self.streams() as (near, far):
            await near.send(b"question")
            await near.end()
            await near.end()
            assert await receive(far) == b"question"
            for _ in range(2):
                with pytest.raises(StreamClosedError):
                    await far.receive()
            with pytest.raises(StreamClosedError):
                await near.send(b"more")
            await far.send(pattern(100_000))
            assert await receive(near) == pattern(100_000)
            await far.end()
            with pytest.raises(StreamClosedError):
                await near.receive()

    async def test_end_wakes_a_waiting_receiver(self) -> None:
        async with self.streams() as (near, far):
            receiving = asyncio.create_task(far.receive())
            await asyncio.sleep(0)
            await near.end()
            with pytest.raises(StreamClosedError):
                await receiving

    async def test_close_delivers_what_was_sent(self) -> None:
        messages = [pattern(40_000, seed) for seed in range(5)]
        async with self.streams() as (near, far):
            for message in messages:
                await near.send(message)
            await near.close()
            await near.close()
            for message in messages:
                assert await receive(far) == message
            with pytest.raises(StreamClosedError):
                await far.receive()

    async def test_closing_the_transport_keeps_what_a_closed_stream_had_sent(self) -> None:
        messages = [pattern(40_000, seed) for seed in range(5)]
        async with self.pair() as pair:
            near, far = await pair.connect()
            for message in messages:
                await near.send(message)
            await near.close()
            await pair.dialler.close()
            for message in messages:
                assert await receive(far) == message
            with pytest.raises(UnavailableError):
                await far.receive()

    async def test_close_with_messages_coming_in(self) -> None:
        async with self.pair() as pair:
            near, far = await pair.connect()
            flood = Flood(far, 4 * self.slack)
            await near.receive()
            async with asyncio.timeout(PROMPT):
                await near.close()
            # The other side's messages are dropped, or its sender is told; it does not wait for ever.
            assert isinstance(await flood.failure(), UnavailableError | None)
            await far.close()
            await _works(*await pair.connect())

    async def test_close_returns_when_the_other_side_does_nothing(self) -> None:
        async with self.streams() as (near, _):
            flood = Flood(near, 4 * self.slack)
            await flood.stalled()
            async with asyncio.timeout(PROMPT):
                await near.close()
            assert isinstance(await flood.failure(), UnavailableError)

    async def test_use_after_close(self) -> None:
        async with self.streams() as (near, _):
            await near.close()
            with pytest.raises(StreamClosedError):
                await near.send(b"late")
            with pytest.raises(StreamClosedError):
                await near.receive()
            await near.end()
            near.abort("late")

    async def test_close_wakes_a_waiting_receiver(self) -> None:
        async with self.streams() as (near, _):
            receiving = asyncio.create_task(near.receive())
            await asyncio.sleep(0)
            await near.close()
            with pytest.raises(StreamClosedError):
                await receiving

    async def test_abort_tells_the_reason(self) -> None:
        async with self.pair() as pair:
            near, far = await pair.connect()
            waiting = asyncio.create_task(far.receive())
            await asyncio.sleep(0)
            near.abort("the cache is gone")
            near.abort("twice")
            with pytest.raises(StreamAbortedError, match="the cache is gone"):
                await waiting
            with pytest.raises(StreamAbortedError, match="the cache is gone"):
                await far.receive()
            failure = await Flood(far, 4 * self.slack).failure()
            assert isinstance(failure, StreamAbortedError) and failure.message == "the cache is gone"
            with pytest.raises(UnavailableError):
                await near.receive()
            await near.close()
            await far.close()
            await _works(*await pair.connect())

    async def test_a_long_reason_is_cut(self) -> None:
        async with self.streams() as (near, far):
            near.abort("é" * 300)
            with pytest.raises(StreamAbortedError) as caught:
                await far.receive()
            assert caught.value.message == "é" * 200

    async def test_abort_passes_a_stalled_stream(self) -> None:
        async with self.streams() as (near, far):
            flood = Flood(near, 4 * self.slack)
            await flood.stalled()
            near.abort("enough")
            with pytest.raises(UnavailableError):
                await flood.task
            with pytest.raises(StreamAbortedError, match="enough"):
                while True:
                    await far.receive()

    async def test_the_receiver_may_abort(self) -> None:
        async with self.streams() as (near, far):
            flood = Flood(near, 4 * self.slack)
            await far.receive()
            far.abort("not wanted")
            with pytest.raises(StreamAbortedError, match="not wanted"):
                await flood.task

    async def test_a_stream_is_closed_when_its_handler_returns(self) -> None:
        async def answer(stream: Stream) -> None:
            await stream.send(b"re: ", await stream.receive())

        async with self.serving(answer) as (dialler, address):
            near = await dialler.open_stream(address)
            await near.send(b"question")
            assert await receive(near) == b"re: question"
            with pytest.raises(StreamClosedError):
                await near.receive()
            await near.close()

    async def test_a_handler_that_fails_takes_nothing_else_down(self) -> None:
        async def fail_once(stream: Stream) -> None:
            message = await receive(stream)
            if message == b"bad":
                raise ValueError("a bug in the application")
            await stream.send(message)

        async with self.serving(fail_once) as (dialler, address):
            bad, good = await dialler.open_stream(address), await dialler.open_stream(address)
            await bad.send(b"bad")
            with pytest.raises(UnavailableError):
                await bad.receive()
            await good.send(b"good")
            assert await receive(good) == b"good"

    async def test_many_streams_one_after_the_other(self) -> None:
        async with self.pair() as pair:
            for _ in range(30):
                near, far = await pair.connect()
                await _works(near, far)
                await near.close()
                await far.close()


async def _works(near: Stream, far: Stream) -> None:
    await near.send(b"there")
    assert await receive(far) == b"there"
    await far.send(b"and back")
    assert await receive(near) == b"and back"

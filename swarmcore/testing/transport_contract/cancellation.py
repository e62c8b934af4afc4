"""Cancellation, in every await: it closes what was opened and harms nothing else."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from swarmcore.errors import UnavailableError
from swarmcore.identity import Identity
from swarmcore.testing.transport_contract.harness import (
    Flood,
    TransportHarness,
    finish,
    pattern,
    receive,
    turn_loop,
)
from swarmcore.transport import Stream


class CancellationContract(TransportHarness):
    turns = 40
    """Cancel after 0, 1, … so many turns of the event loop: a step of each operation is hit."""

    async def test_a_cancelled_receive_loses_nothing(self) -> None:
        async with self.streams() as (near, far):
            expected = [pattern(1000, seed) for seed in range(self.turns)]
            received: list[bytes] = []
            for turns, message in enumerate(expected):
                receiving = asyncio.create_task(far.receive())
                await near.send(message)
                await turn_loop(turns)
                receiving.cancel()
                await asyncio.wait([receiving])
                if not receiving.cancelled():
                    received.append(bytes(receiving.result()))
            while len(received) < len(expected):
                received.append(bytes(await far.receive()))
            assert received == expected

    async def test_a_cancelled_send_never_delivers_half_a_message(self) -> None:
        big = pattern(self.limits.max_message)
        for turns in range(0, self.turns, 4):
            async with self.pair() as pair:
                near, far = await pair.connect()
                sending = asyncio.create_task(near.send(big))
                await turn_loop(turns)
                await finish(sending)
                # The next one works, or says that the stream is gone; it does not hang.
                after = asyncio.create_task(near.send(b"after"))
                try:
                    message = await receive(far)
                    if message == big:
                        message = await receive(far)
                    assert message == b"after"
                    await after
                except UnavailableError:
                    assert sending.cancelled()
                    await asyncio.wait([after])
                    assert after.exception() is None or isinstance(after.exception(), UnavailableError)

    async def test_a_cancelled_send_that_waits_for_a_slow_reader(self) -> None:
        async with self.streams() as (near, far):
            flood = Flood(near, 4 * self.slack)
            await flood.stalled()
            await finish(flood.task)
            accepted = flood.accepted // flood.size
            with contextlib.suppress(UnavailableError):
                for index in range(accepted):
                    assert await receive(far) == flood.message(index)
            near.abort("done")

    async def test_a_cancelled_open_stream_leaves_nothing(self) -> None:
        async with self.pair() as pair:
            for turns in range(self.turns):
                opening = asyncio.create_task(pair.dialler.open_stream(pair.address))
                await turn_loop(turns)
                opening.cancel()
                await asyncio.wait([opening])
                if not opening.cancelled():
                    await opening.result().close()
            near = await pair.dialler.open_stream(pair.address)
            await near.send(b"the last one")
            while True:
                far = await pair.incoming.get()
                try:
                    assert await receive(far) == b"the last one"
                    break
                except UnavailableError:
                    pass  # one of those that were given up

    async def test_a_cancelled_close_of_a_stream(self) -> None:
        async with self.pair() as pair:
            for turns in range(5):
                near, far = await pair.connect()
                await near.send(pattern(50_000))
                closing: asyncio.Task[None] = asyncio.create_task(near.close())
                await turn_loop(turns)
                await finish(closing)
                await near.close()
                try:
                    assert await receive(far) == pattern(50_000)
                except UnavailableError:
                    assert turns < 5
                await far.close()

    async def test_a_cancelled_end(self) -> None:
        async with self.streams() as (near, far):
            ending: asyncio.Task[None] = asyncio.create_task(near.end())
            await asyncio.sleep(0)
            await finish(ending)
            await near.close()
            with pytest.raises(UnavailableError):
                await far.receive()

    async def test_a_cancelled_listen_leaves_the_place_free(self) -> None:
        before = asyncio.all_tasks()
        for turns in range(0, self.turns, 4):
            transport = self.make(Identity.generate(), self.limits, [self.free_place()])
            listening = asyncio.create_task(transport.listen(_ignore))
            await turn_loop(turns)
            listening.cancel()
            await asyncio.wait([listening])
            await transport.close()
            await turn_loop(10)
            assert asyncio.all_tasks() == before

    async def test_a_cancelled_close_of_a_transport(self) -> None:
        for turns in range(0, 10, 2):
            async with self.pair() as pair:
                near, far = await pair.connect()
                closing: asyncio.Task[None] = asyncio.create_task(pair.listener.close())
                await turn_loop(turns)
                await finish(closing)
                await pair.listener.close()
                with pytest.raises(UnavailableError):
                    await near.receive()
                with pytest.raises(UnavailableError):
                    await far.receive()


async def _ignore(stream: Stream) -> None:
    return

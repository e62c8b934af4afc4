"""Peers: proven ids, strangers and garbage refused, many streams at once, and peers that vanish."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from swarmcore.errors import (
    AddressInUseError,
    PeerIdentityError,
    PeerUnreachableError,
    SwarmError,
    UnavailableError,
)
from swarmcore.identity import Identity
from swarmcore.testing.transport_contract.harness import Flood, TransportHarness, pattern, receive
from swarmcore.transport import Stream

GARBAGE = {
    "nothing": b"",
    "zeros": bytes(100_000),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "noise": pattern(100_000),
    "claim": b"\xff" * 16,
}


class PeersContract(TransportHarness):
    async def test_another_peer_at_the_address_is_refused(self) -> None:
        async with self.pair() as pair:
            stranger = Identity.generate().peer
            with pytest.raises(PeerIdentityError):
                await pair.dialler.open_stream(attrs.evolve(pair.address, peer=stranger))
            assert pair.incoming.empty()
            await pair.connect()

    async def test_nobody_at_the_address(self) -> None:
        async with self.pair() as pair:
            await pair.listener.close()
            with pytest.raises(PeerUnreachableError):
                await pair.dialler.open_stream(pair.address)

    async def test_a_place_that_is_taken(self) -> None:
        async with self.pair() as pair:
            second = self.make(Identity.generate(), self.limits, [self.place_of(pair.address)])
            with pytest.raises(AddressInUseError):
                await second.listen(_answer)
            await second.close()
            await pair.connect()

    @pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
    async def test_garbage_instead_of_a_handshake(self, garbage: bytes) -> None:
        limits = attrs.evolve(self.limits, connect_timeout=1.0)
        async with self.pair(limits) as pair:
            await asyncio.gather(*(self.send_garbage(pair.address, garbage) for _ in range(3)))
            assert pair.incoming.empty()
            await pair.connect()

    async def test_200_streams_at_once(self) -> None:
        async with self.serving(_answer) as (dialler, address):

            async def ask(number: int) -> None:
                stream = await dialler.open_stream(address)
                for turn in range(3):
                    await stream.send(b"%d.%d " % (number, turn), pattern(3000, number))
                    assert await receive(stream) == b"%d.%d " % (number, turn) + pattern(3000, number)
                await stream.close()

            await asyncio.gather(*(ask(number) for number in range(200)))

    async def test_both_sides_may_dial(self) -> None:
        async with self.pair() as pair:
            other = self.make(Identity.generate(), self.limits, [self.free_place()])
            try:
                (address, *_) = await other.listen(_answer)
                for transport in (pair.listener, pair.dialler):
                    stream = await transport.open_stream(address)
                    await stream.send(b"hello")
                    assert await receive(stream) == b"hello"
            finally:
                await other.close()

    async def test_a_killed_listener(self) -> None:
        async with self.pair() as pair:
            streams = [await pair.connect() for _ in range(3)]
            waiting = [asyncio.create_task(near.receive()) for near, _ in streams]
            await asyncio.sleep(0)
            await self.kill(pair.listener)
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, UnavailableError)
            flood = Flood(streams[0][0], 4 * self.slack)
            assert isinstance(await flood.failure(), UnavailableError)
            with pytest.raises(UnavailableError):
                await pair.dialler.open_stream(pair.address)
            for near, _ in streams:
                await near.close()

    async def test_a_killed_dialler(self) -> None:
        async with self.pair() as pair:
            _, far = await pair.connect()
            flood = Flood(far, 4 * self.slack)
            waiting = asyncio.create_task(far.receive())
            await asyncio.sleep(0)
            await self.kill(pair.dialler)
            assert isinstance(await flood.failure(), UnavailableError)
            with pytest.raises(UnavailableError):
                await waiting

    async def test_a_closed_transport(self) -> None:
        async with self.pair() as pair:
            near, far = await pair.connect()
            await pair.dialler.close()
            await pair.dialler.close()
            for stream in (near, far):
                with pytest.raises(UnavailableError):
                    await stream.receive()
            with pytest.raises(SwarmError):
                await pair.dialler.open_stream(pair.address)

    async def test_closing_during_a_dial(self) -> None:
        async with self.pair() as pair:
            dialling = [asyncio.create_task(pair.dialler.open_stream(pair.address)) for _ in range(5)]
            await asyncio.sleep(0)
            await pair.dialler.close()
            for outcome in await asyncio.gather(*dialling, return_exceptions=True):
                if isinstance(outcome, Stream):  # it was quick; then the stream has been aborted
                    with pytest.raises(UnavailableError):
                        await outcome.receive()
                else:
                    assert isinstance(outcome, SwarmError)


async def _answer(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())

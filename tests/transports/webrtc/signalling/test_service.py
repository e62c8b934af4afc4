"""The signalling service, and those who misuse it: each is refused or dropped, and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from small_resources import bounded

from swarmcore.identity import Identity
from swarmcore.resources import Bounds, Resource, ResourceManager
from swarmcore.types import PeerId

pytest.importorskip("aiortc", reason="needs the extra webrtc")
import aiohttp
from raw_signalling import connected, registered

from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.signalling.messages import (
    MAX_SIGNAL,
    NEGOTIATION_ID_BYTES,
    REPLACED,
    Absent,
    Challenge,
    Register,
    Registered,
    encode,
    registration,
    signed_envelope,
)
from swarmcore_transports.webrtc.signalling.service import ServiceLimits, SignallingService

EXCHANGE = bytes(NEGOTIATION_ID_BYTES)


@asynccontextmanager
async def service(
    resources: ResourceManager | None = None, **limits: Any
) -> AsyncIterator[tuple[SignallingService, ServiceAddress]]:
    running = SignallingService(ServiceLimits(**limits), resources)
    try:
        yield running, await running.start(ServiceAddress("127.0.0.1", 0))
    finally:
        await running.close()


async def passes(place: ServiceAddress) -> None:
    """Two peers who do nothing wrong are served."""
    async with registered(place) as one, registered(place) as other:
        await one.send(other.peer, EXCHANGE, "offer", "hello")
        assert (await other.receive()).exchange == EXCHANGE


async def code_of(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    """Wait until the service hangs up, and say with what code."""
    async with asyncio.timeout(5):
        async for _ in socket:
            pass
    return socket.close_code


FIRST_WORDS = {
    "garbage": "garbage",
    "bytes": b"\xff" * 100,
    "out of turn": encode(Registered()),
    "another's signature": encode(Register(Identity.generate().peer, bytes(64))),
    "signed for another challenge": encode(registration(Identity.generate(), Challenge(bytes(32)))),
    "no peer": encode(Register("nobody", b"")),
}


@pytest.mark.parametrize("words", FIRST_WORDS.values(), ids=FIRST_WORDS.keys())
async def test_who_does_not_prove_an_identity_is_hung_up_on(words: str | bytes) -> None:
    async with service() as (running, place), connected(place) as socket:
        await (socket.send_str(words) if isinstance(words, str) else socket.send_bytes(words))
        assert await code_of(socket) == 4003
        assert running.counters == {"refused": 1}
        await passes(place)


async def test_who_says_nothing_is_hung_up_on() -> None:
    async with service(proof_timeout=0.1) as (running, place), connected(place) as socket:
        assert await code_of(socket) == 4003
        assert running.counters == {"refused": 1}


SAYINGS = {"nothing": b"", "half a head": b"GET /swarmcore/signalling/1 HTTP/1.1\r\nHost: x\r\n"}


@pytest.mark.parametrize("words", SAYINGS.values(), ids=SAYINGS.keys())
async def test_of_those_that_never_ask_the_oldest_make_room_and_all_are_hung_up_on(words: bytes) -> None:
    resources = bounded(descriptors=Bounds(100, 50, unproven=8, protocol=100))
    async with service(resources, proof_timeout=0.5) as (_, place):
        silent = [await asyncio.open_connection(place.host, place.port) for _ in range(12)]
        for _, writer in silent:
            writer.write(words)
        async with asyncio.timeout(5):
            for reader, _ in silent[:6]:  # strangers get three quarters of the bound
                assert await reader.read() == b""
            await passes(place)
            for reader, _ in silent[6:]:
                assert await reader.read() == b""
            while resources.used(Resource.DESCRIPTORS):
                await asyncio.sleep(0.01)
        for _, writer in silent:
            writer.close()


async def test_who_has_proven_an_identity_makes_room_for_nobody_unproven() -> None:
    resources = bounded(descriptors=Bounds(8, 8, unproven=8, protocol=8))
    async with service(resources) as (_, place), registered(place) as one, registered(place) as other:
        silent = [await asyncio.open_connection(place.host, place.port) for _ in range(20)]
        assert resources.used(Resource.DESCRIPTORS, one.peer) == 1
        await one.send(other.peer, EXCHANGE, "offer", "hello")
        assert (await other.receive()).exchange == EXCHANGE
        for _, writer in silent:
            writer.close()


async def test_beyond_a_number_of_peers_the_next_is_refused_until_one_leaves() -> None:
    async with service(peers=2) as (running, place):
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(registered(place))
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                async with connected(place):
                    pass
            assert running.counters["refused"] == 1
        async with asyncio.timeout(5):
            while True:
                try:
                    return await passes(place)
                except aiohttp.WSServerHandshakeError:  # it has yet to notice that they are gone
                    await asyncio.sleep(0.01)


async def test_envelopes_faster_than_the_rate_are_dropped() -> None:
    async with (
        service(rate=0.001, burst=5.0) as (running, place),
        registered(place) as one,
        registered(place) as other,
    ):
        for number in range(100):
            await one.send(other.peer, number.to_bytes(NEGOTIATION_ID_BYTES, "big"), "offer", "x")
        await other.send(one.peer, EXCHANGE, "answer", "enough")
        assert (await one.receive()).exchange == EXCHANGE
        numbers = [int.from_bytes((await other.receive()).exchange, "big") for _ in range(5)]
        assert numbers == list(range(5))
        async with asyncio.timeout(5):
            while running.counters["dropped"] < 95:
                await asyncio.sleep(0.01)
        assert running.counters["passed"] == 6


async def test_whoever_runs_the_service_answers_as_much_as_it_has_to() -> None:
    owner = Identity.generate()
    running = SignallingService(ServiceLimits(rate=0.1, burst=2), owner=owner.peer)
    try:
        place = await running.start(ServiceAddress("127.0.0.1", 0))
        async with registered(place, owner) as own, registered(place) as other:
            for _ in range(20):
                await own.send(other.peer, EXCHANGE, "answer", "hello")
            for _ in range(20):
                assert (await other.receive()).exchange == EXCHANGE
    finally:
        await running.close()


async def test_what_a_registered_peer_may_not_say_is_dropped_and_it_stays() -> None:
    async with service() as (running, place), registered(place) as one, registered(place) as other:
        anothers = signed_envelope(
            Identity.generate(), other.peer, EXCHANGE, "offer", "in the name of a third"
        )
        wrong = ["", "garbage", "[1]", encode(Registered()), encode(anothers), '{"type":"envelope"}']
        for words in wrong:
            await one.socket.send_str(words)
        await one.socket.send_bytes(b"bytes")
        await one.send(other.peer, EXCHANGE, "offer", "the first that counts")
        signal = await other.receive()
        assert not isinstance(signal, Absent) and signal.body == "the first that counts"
        assert running.counters["dropped"] == len(wrong) + 1


async def test_a_message_above_the_limit_ends_the_connection() -> None:
    async with service() as (_, place), registered(place) as one:
        await one.socket.send_str(" " * (MAX_SIGNAL + 1))
        assert await code_of(one.socket) == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        await passes(place)


async def test_for_a_peer_that_does_not_read_there_is_a_bound() -> None:
    """Then its senders hear that it gets more than it can take; others are served all the while."""
    async with (
        service(waiting=4, rate=1e6, burst=1e6) as (running, place),
        registered(place) as one,
        registered(place) as deaf,
    ):
        refusal = asyncio.create_task(one.receive())
        body = "x" * 30_000
        while not refusal.done():
            await one.send(deaf.peer, EXCHANGE, "offer", body)
            await asyncio.sleep(0)
        signal = refusal.result()
        assert isinstance(signal, Absent)
        assert (signal.receiver, signal.exchange) == (deaf.peer, EXCHANGE)
        assert "more than it can take" in signal.reason
        assert running.counters["absent"] >= 1
        await passes(place)


async def test_what_waits_for_slow_peers_is_counted_for_those_who_sent_it() -> None:
    resources = bounded(bytes=Bounds(10**8, 4 * 10**6, 10**6, 10**8))
    async with (
        service(resources, rate=1e6, burst=1e6) as (_, place),
        registered(place) as one,
        registered(place) as deaf,
    ):
        refusal = asyncio.create_task(one.receive())
        while not refusal.done():
            await one.send(deaf.peer, EXCHANGE, "offer", "x" * 30_000)
            await asyncio.sleep(0)
        signal = refusal.result()
        assert isinstance(signal, Absent)
        assert "too much waits here" in signal.reason
        assert resources.used(Resource.BYTES, one.peer) > 500_000
        await passes(place)
    assert resources.used(Resource.BYTES) == 0


async def test_an_envelope_with_parts_of_impossible_length_is_not_passed_on() -> None:
    async with service() as (running, place), registered(place) as one, registered(place) as other:
        await one.send(other.peer, bytes(40_000), "offer", "hello")
        await one.send(PeerId("x" * 40_000), EXCHANGE, "offer", "hello")
        await one.send(other.peer, EXCHANGE, "offer", "hello")
        assert (await other.receive()).exchange == EXCHANGE
        assert (running.counters["dropped"], running.counters["passed"]) == (2, 1)


async def test_of_one_peer_the_last_connection_counts() -> None:
    identity = Identity.generate()
    async with (
        service() as (running, place),
        registered(place, identity) as before,
        registered(place, identity) as now,
        registered(place) as other,
    ):
        last = await before.socket.receive(timeout=10.0)
        assert (last.type, last.data) == (aiohttp.WSMsgType.CLOSE, REPLACED)
        await other.send(identity.peer, EXCHANGE, "offer", "hello")
        assert (await now.receive()).exchange == EXCHANGE
        assert running.counters["registered"] == 3


@pytest.mark.parametrize(
    "receiver", [Identity.generate().peer, "nobody", ""], ids=["away", "no peer", "empty"]
)
async def test_what_is_for_nobody_here_comes_back(receiver: str) -> None:
    async with service() as (_, place), registered(place) as one:
        await one.send(PeerId(receiver), EXCHANGE, "offer", "hello")
        signal = await one.receive()
        assert isinstance(signal, Absent) and signal.receiver == receiver
        assert "not connected" in signal.reason

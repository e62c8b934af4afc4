"""Connections that get another path, and peers that signal through a third one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.wire.limits import Limits

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from swarmcore_transports.webrtc.locations import service_of  # noqa: E402

LIMITS = Limits(connect_timeout=5.0)


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


@asynccontextmanager
async def peer(**options: Any) -> AsyncIterator[Any]:
    transport = webrtc.WebRtcTransport(Identity.generate(), **({"limits": LIMITS} | options))
    try:
        yield transport
    finally:
        await transport.close()


async def exchanged(stream: Stream, size: int) -> None:
    sending = asyncio.create_task(stream.send(bytes(size)))
    assert bytes(await stream.receive()) == bytes(size)
    await sending


async def test_a_restart_keeps_streams_and_what_is_under_way() -> None:
    async with peer(listen_on=["127.0.0.1:0"]) as listener, peer() as dialler:
        [address] = await listener.listen(echo)
        stream = await dialler.open_stream(address)
        await exchanged(stream, 1000)
        [link] = dialler._links.current()
        moved = asyncio.Event()
        link.connection.on_moved = moved.set
        agent = link.connection._agent_in_use()
        async with asyncio.timeout(10):
            exchange = asyncio.create_task(exchanged(stream, 2**20))
            dialler._restarts.begin(link, "the test wants it")
            await moved.wait()
            await exchange
            assert link.connection._agent_in_use() is not agent
            await exchanged(stream, 2**18)
        assert dialler._restarts.begun == 1


async def test_peers_that_share_a_third_need_no_service() -> None:
    async with (
        peer(listen_on=["127.0.0.1:0"]) as third,
        peer(listen_on=["127.0.0.1:0"]) as listener,
        peer() as dialler,
    ):
        [meeting] = await third.listen(echo)
        [address] = await listener.listen(echo)
        both = [await one.open_stream(meeting) for one in (listener, dialler)]
        for stream in both:
            await exchanged(stream, 10)
        for service in listener._meeting_points.services:
            await service.close()
        stream = await dialler.open_stream(address)
        assert stream.remote == address.peer
        await exchanged(stream, 1000)
        assert third.counters["passed"] >= 2


async def test_a_third_peer_that_does_not_know_the_peer_says_so() -> None:
    async with peer(listen_on=["127.0.0.1:0"]) as third, peer() as dialler:
        [meeting] = await third.listen(echo)
        await exchanged(await dialler.open_stream(meeting), 10)
        nobody = service_of(meeting).address(Identity.generate().peer)
        with pytest.raises(PeerUnreachableError, match="signalling"):
            await dialler.open_stream(nobody)
        assert third.counters["absent"] >= 1


async def test_in_a_closed_swarm_nothing_is_passed_on_for_others() -> None:
    async with (
        peer(listen_on=["127.0.0.1:0"]) as third,
        peer(listen_on=["127.0.0.1:0"]) as listener,
        peer() as dialler,
    ):
        third.allow_only([listener.identity.peer])
        [meeting] = await third.listen(echo)
        [address] = await listener.listen(echo)
        for one in (listener, dialler):
            await exchanged(await one.open_stream(meeting), 10)
        for service in listener._meeting_points.services:
            await service.close()
        with pytest.raises(PeerUnreachableError):
            await dialler.open_stream(address)
        assert third.counters["passed"] == 0

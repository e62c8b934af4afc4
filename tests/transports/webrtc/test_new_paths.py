"""ConnectionManager that get another path, and peers that signal through a third one."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.transport import Stream

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_peers import dialler, echo  # noqa: E402

from swarmcore_transports.webrtc.addresses import service_of  # noqa: E402


async def exchanged(stream: Stream, size: int) -> None:
    sending = asyncio.create_task(stream.send(bytes(size)))
    assert bytes(await stream.receive()) == bytes(size)
    await sending


async def test_a_restart_keeps_streams_and_what_is_under_way() -> None:
    async with dialler(listen_on=["127.0.0.1:0"]) as listener, dialler() as a:
        [address] = await listener.listen(echo)
        stream = await a.open_stream(address)
        await exchanged(stream, 1000)
        [managed] = a._connector.connections.current()
        moved = asyncio.Event()
        managed.connection.on_path_changed = moved.set
        agent = managed.connection._agent_in_use()
        async with asyncio.timeout(10):
            exchange = asyncio.create_task(exchanged(stream, 2**20))
            a._connector.restarter.begin(managed, "the test wants it")
            await moved.wait()
            await exchange
            assert managed.connection._agent_in_use() is not agent
            await exchanged(stream, 2**18)
        assert a._connector.restarter.begun == 1


async def test_peers_that_share_a_third_need_no_service() -> None:
    async with (
        dialler(listen_on=["127.0.0.1:0"]) as third,
        dialler(listen_on=["127.0.0.1:0"]) as listener,
        dialler() as a,
    ):
        [meeting] = await third.listen(echo)
        [address] = await listener.listen(echo)
        both = [await one.open_stream(meeting) for one in (listener, a)]
        for stream in both:
            await exchanged(stream, 10)
        for service in listener._endpoints.services:
            await service.close()
        stream = await a.open_stream(address)
        assert stream.remote == address.peer
        await exchanged(stream, 1000)
        assert third.counters["passed"] >= 2


async def test_a_third_peer_that_does_not_know_the_peer_says_so() -> None:
    async with dialler(listen_on=["127.0.0.1:0"]) as third, dialler() as a:
        [meeting] = await third.listen(echo)
        await exchanged(await a.open_stream(meeting), 10)
        nobody = service_of(meeting).address(Identity.generate().peer)
        with pytest.raises(PeerUnreachableError, match="signalling"):
            await a.open_stream(nobody)
        assert third.counters["absent"] >= 1


async def test_in_a_closed_swarm_nothing_is_passed_on_for_others() -> None:
    async with (
        dialler(listen_on=["127.0.0.1:0"]) as third,
        dialler(listen_on=["127.0.0.1:0"]) as listener,
        dialler() as a,
    ):
        [meeting] = await third.listen(echo)
        [address] = await listener.listen(echo)
        for one in (listener, a):
            await exchanged(await one.open_stream(meeting), 10)
        third.allow_only([listener.identity.peer])
        for service in listener._endpoints.services:
            await service.close()
        with pytest.raises(PeerUnreachableError):
            await a.open_stream(address)
        assert third.counters["passed"] == 0


async def test_in_a_closed_swarm_others_do_not_meet_here() -> None:
    async with dialler(listen_on=["127.0.0.1:0"]) as listener, dialler() as friend, dialler() as stranger:
        listener.allow_only([friend.identity.peer])
        [address] = await listener.listen(echo)
        await exchanged(await friend.open_stream(address), 10)
        with pytest.raises(PeerUnreachableError, match="this swarm is closed"):
            await stranger.open_stream(address)
        [service] = listener._endpoints.services
        assert service.counters["refused"] == 1

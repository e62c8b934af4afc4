"""WebRTC connections that are closed in each of their states: what waits ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from swarmcore.errors import ConnectionLostError

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_engines import Messages, Pair, pair

from swarmcore_transports.webrtc.engine import PeerConnection


async def new(found: Pair) -> None: ...


async def offered(found: Pair) -> None:
    await found.dialler.offer()


async def answered(found: Pair) -> None:
    """The listener looks for the dialler, who knows nothing of it."""
    await found.listener.answer(await found.dialler.offer())


async def connecting(found: Pair) -> None:
    await found.exchange(found.dialler.offer)


async def connected(found: Pair) -> None:
    await found.connect()


async def restarting(found: Pair) -> None:
    await found.connect()
    await found.dialler.restart()


async def restart_answered(found: Pair) -> None:
    await found.connect()
    await found.listener.answer(await found.dialler.restart())


async def moving(found: Pair) -> None:
    await found.connect()
    await found.exchange(found.dialler.restart)


async def moved(found: Pair) -> None:
    await found.connect()
    await found.restart()


STATES = [new, offered, answered, connecting, connected, restarting, restart_answered, moving, moved]
BEFORE_CONNECTED = STATES[:4]

State = Callable[[Pair], Awaitable[None]]


@pytest.mark.parametrize("state", STATES)
async def test_either_side_closes_in_any_state(state: State) -> None:
    async with pair() as found:
        await state(found)
        await asyncio.gather(*(found.dialler.close() for _ in range(3)))
        await found.dialler.close()
    async with pair() as found:
        await state(found)
        await found.listener.close()
        await found.listener.close()


@pytest.mark.parametrize("state", BEFORE_CONNECTED)
async def test_who_waits_for_a_connection_hears_that_it_is_closed(state: State) -> None:
    async with pair() as found:
        await state(found)
        waits = [
            asyncio.create_task(work)
            for side in (found.dialler, found.listener)
            for work in (side.connected(), _open(side))
        ]
        await asyncio.sleep(0)
        await found.close()
        for wait in waits:
            with pytest.raises(ConnectionLostError):
                await wait


async def _open(side: PeerConnection) -> None:
    """As `connecting` may have got as far as that before the end, close what opens."""
    (await side.open_channel()).close()
    raise ConnectionLostError("it was open")


@pytest.mark.parametrize("name", ["offer", "answer", "accept", "restart", "answer to a restart", "new path"])
async def test_what_is_under_way_ends_with_the_connection(name: str) -> None:
    """However far it has come."""
    for steps in (0, 1, 2, 4, 8):
        async with pair() as found:
            work, side = await _begun(name, found)
            task = asyncio.create_task(work)
            for _ in range(steps):
                await asyncio.sleep(0)
            await side.close()
            with suppress(ConnectionLostError):  # else it was done before
                await task


async def _begun(name: str, found: Pair) -> tuple[Coroutine[Any, Any, Any], PeerConnection]:
    if name == "offer":
        return found.dialler.offer(), found.dialler
    if name == "answer":
        return found.listener.answer(await found.dialler.offer()), found.listener
    if name == "accept":
        return found.dialler.accept(await found.listener.answer(await found.dialler.offer())), found.dialler
    await found.connect()
    if name == "restart":
        return found.dialler.restart(), found.dialler
    if name == "answer to a restart":
        return found.listener.answer(await found.dialler.restart()), found.listener
    return found.dialler.accept(await found.listener.answer(await found.dialler.restart())), found.dialler


@pytest.mark.parametrize("state", [new, offered, connected, restarting])
async def test_a_closed_connection_does_nothing_more(state: State) -> None:
    async with pair() as other:
        offer = await other.dialler.offer()
        answer = await other.listener.answer(offer)
    async with pair() as found:
        await state(found)
        signals = Messages(found.dialler.signalling_channel)
        await found.dialler.close()
        await signals.closed.wait()
        works: list[Callable[[], Awaitable[object]]] = [
            found.dialler.offer,
            lambda: found.dialler.answer(offer),
            lambda: found.dialler.accept(answer),
            found.dialler.restart,
            found.dialler.open_channel,
        ]
        for work in works:
            with pytest.raises(ConnectionLostError):
                await work()
        await found.dialler.add_candidate("candidate:1 1 udp 2113937151 127.0.0.1 9 typ host")
        await found.dialler.add_candidate("")
        signals.channel.send(b"to nobody")
        assert found.dialler.path == "direct"


async def test_the_other_side_hears_of_the_end() -> None:
    for closer in (0, 1):
        async with pair() as found:
            await found.connect()
            sides = [found.dialler, found.listener]
            ends = [end for side in sides for end in await found.channel(side)]
            other = sides[1 - closer]
            await sides[closer].close()
            await found.lost[other].wait()
            for end in ends:
                await end.closed.wait()
            with pytest.raises(ConnectionLostError):
                await other.open_channel()
            await other.close()


async def test_who_is_given_up_while_it_opens_a_channel_leaves_none() -> None:
    """The task that waits is cancelled; the connection goes on."""
    async with pair() as found:
        opening = asyncio.create_task(found.dialler.open_channel())
        await offered(found)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await found.connect()
        sender, receiver = await found.channel(found.dialler)
        sender.channel.send(b"for the one that is there")
        assert await receiver.next() == b"for the one that is there"
        assert found.arrived[found.listener].empty()


async def test_what_is_sent_while_dtls_is_being_closed_is_lost_in_silence() -> None:
    async with pair() as found:
        await found.connect()
        await found.channel(found.dialler)
        sctp = found.dialler._sctp  # type: ignore[attr-defined]
        sctp.transport._ssl.shutdown()
        with pytest.raises(ConnectionError):
            await sctp._probe_path()
        sctp._send_soon(sctp._probe_path)
        found.dialler.signalling_channel.send(b"too late")

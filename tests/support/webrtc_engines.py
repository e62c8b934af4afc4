"""Two connections of the WebRTC engine in this process, and what they say to each other by hand."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs

from swarmcore_transports.webrtc.engine import DataChannel, PeerConnection, connection_class

DEADLINE = 20.0


class Messages:
    """Who uses a channel: keeps what comes, and tells when it may be sent more and when it is closed."""

    def __init__(self, channel: DataChannel) -> None:
        self.channel = channel
        self.low = asyncio.Event()
        self.closed = asyncio.Event()
        self._come: asyncio.Queue[bytes] = asyncio.Queue()
        channel.set_handler(self)

    def message_received(self, data: bytes) -> None:
        self._come.put_nowait(data)

    def buffered_amount_low(self) -> None:
        self.low.set()

    def channel_closed(self) -> None:
        self.closed.set()

    async def next(self) -> bytes:
        return await self._come.get()


class Trickle:
    """The candidates of ``speaker``'s latest description, on their way to ``hearer``.

    They wait until `pass_on`: the peer gets the description first. ``touch`` may change each, or drop it.
    """

    def __init__(self, speaker: PeerConnection, hearer: PeerConnection) -> None:
        self._hearer = hearer
        self.said: list[str] = []
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        speaker.on_candidate = self._found

    def _found(self, candidate: str) -> None:
        self.said.append(candidate)
        self._waiting.put_nowait(candidate)

    async def pass_on(self) -> None:
        """Until cancelled."""
        while True:
            await self._hearer.add_candidate(await self._waiting.get())


@attrs.define(eq=False)
class Pair:
    """Two connections, of which ``dialler`` makes the offers."""

    dialler: PeerConnection
    listener: PeerConnection
    arrived: dict[PeerConnection, asyncio.Queue[DataChannel]]
    lost: dict[PeerConnection, asyncio.Event]
    moved: dict[PeerConnection, asyncio.Event]
    _trickling: list[asyncio.Task[None]] = attrs.field(factory=list)

    async def exchange(self, offer: Callable[[], Any]) -> None:
        """The descriptions: ``offer`` makes the first. Candidates follow from now on."""
        for task in self._trickling:
            task.cancel()
        trickles = Trickle(self.dialler, self.listener), Trickle(self.listener, self.dialler)
        answer = await self.listener.answer(await offer())
        self._trickling = [asyncio.create_task(trickles[0].pass_on())]
        await self.dialler.accept(answer)
        self._trickling.append(asyncio.create_task(trickles[1].pass_on()))

    async def connect(self) -> None:
        await self.exchange(self.dialler.offer)
        await asyncio.gather(self.dialler.connected(), self.listener.connected())

    async def restart(self) -> None:
        """Negotiate a new path. When it is taken, if it is while the old one works, shows in `moved`."""
        for event in self.moved.values():
            event.clear()
        await self.exchange(self.dialler.restart)

    async def channel(self, opener: PeerConnection) -> tuple[Messages, Messages]:
        """A new one that ``opener`` opens: its end, and that of the other side."""
        other = self.listener if opener is self.dialler else self.dialler
        channel = await opener.open_channel()
        return Messages(channel), Messages(await self.arrived[other].get())

    async def close(self) -> None:
        for task in self._trickling:
            task.cancel()
        await asyncio.gather(self.dialler.close(), self.listener.close())


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """One that is not connected yet; closed in the end, with a deadline for all of it."""
    make = connection_class()
    sides = make(()), make(())
    found = Pair(
        *sides,
        arrived={side: asyncio.Queue() for side in sides},
        lost={side: asyncio.Event() for side in sides},
        moved={side: asyncio.Event() for side in sides},
    )
    for side in sides:
        side.on_channel = found.arrived[side].put_nowait
        side.on_lost = lambda reason, event=found.lost[side]: event.set()  # type: ignore[misc]
        side.on_path_changed = found.moved[side].set
    async with nothing_left():
        try:
            async with asyncio.timeout(DEADLINE):
                yield found
        finally:
            async with asyncio.timeout(DEADLINE):
                await found.close()


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """See that no task that was begun within outlives it, and that nothing fails unseen."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    before = asyncio.all_tasks()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    gc.disable()  # what is made within stays in the youngest generation, which is looked through quickly
    try:
        yield
        left = asyncio.all_tasks() - before
        if left:
            _, left = await asyncio.wait(left, timeout=DEADLINE)
        assert not left, left
        for _ in range(3):
            gc.collect(0)
            await asyncio.sleep(0)
        assert not complaints, complaints
    finally:
        gc.enable()
        loop.set_exception_handler(None)

"""Two connected transports for a test, and the check that they leave nothing behind."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest

from swarmcore.errors import SwarmError
from swarmcore.identity import Identity
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address
from swarmcore.wire.limits import Limits

CONTRACT_LIMITS = Limits(max_message=8 * 2**20, send_buffer=256 * 1024, connect_timeout=5.0)
"""Small enough that a test reaches them quickly."""


@attrs.frozen
class Pair:
    """A transport that listens and one that dials it."""

    listener: Transport
    dialler: Transport
    address: Address
    incoming: asyncio.Queue[Stream]
    """The listener's ends of the streams, which stay open until the pair goes."""

    async def connect(self) -> tuple[Stream, Stream]:
        """A new stream: the dialler's end and the listener's end."""
        near = await self.dialler.open_stream(self.address)
        return near, await self.incoming.get()


class TransportHarness(ABC):
    """How the contract reaches a backend."""

    pytestmark = pytest.mark.asyncio

    limits = CONTRACT_LIMITS
    timeout = 30.0
    """Seconds after which a test counts as hanging."""
    slack = 16 * 2**20
    """Bytes that `send` may take beyond ``limits.send_buffer`` while nobody reads: the kernel's buffers."""

    @abstractmethod
    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        """A new transport. One without a place to listen on only dials."""

    @abstractmethod
    def free_place(self) -> str:
        """A place to listen on that nobody has, in the backend's notation; the same one each time will do
        when the backend then finds a free one itself, as with port 0."""

    async def send_garbage(self, address: Address, data: bytes) -> None:
        """Connect below the transport, send ``data``, and return when the listener has hung up.

        Skips the test unless overridden: a backend without sockets has nothing to send garbage to.
        """
        pytest.skip("this backend gives no way to send garbage")

    async def kill(self, transport: Transport) -> None:
        """Make ``transport`` vanish as abruptly as this backend can, and release what it held."""
        await transport.close()

    def place_of(self, address: Address) -> str:
        """What has to be in ``listen_on`` to listen where ``address`` does."""
        return address.location.removeprefix("//")

    @asynccontextmanager
    async def pair(self, limits: Limits | None = None) -> AsyncIterator[Pair]:
        """Two transports, closed at the end, when no task of theirs may be left."""
        incoming: asyncio.Queue[Stream] = asyncio.Queue()

        async def hold(stream: Stream) -> None:
            incoming.put_nowait(stream)
            await asyncio.Event().wait()  # until the transport is closed and cancels this

        async with self._connected(hold, limits or self.limits) as (listener, dialler, address):
            yield Pair(listener, dialler, address, incoming)

    @asynccontextmanager
    async def streams(self) -> AsyncIterator[tuple[Stream, Stream]]:
        """Both ends of a stream between such a `pair`: the dialler's, the listener's."""
        async with self.pair() as pair:
            yield await pair.connect()

    @asynccontextmanager
    async def serving(self, handler: OnStream) -> AsyncIterator[tuple[Transport, Address]]:
        """A transport to dial with, and the address of another whose streams ``handler`` gets."""
        async with self._connected(handler, self.limits) as (_, dialler, address):
            yield dialler, address

    @asynccontextmanager
    async def _connected(
        self, handler: OnStream, limits: Limits
    ) -> AsyncIterator[tuple[Transport, Transport, Address]]:
        before = asyncio.all_tasks()
        listener = self.make(Identity.generate(), limits, [self.free_place()])
        dialler = self.make(Identity.generate(), limits, [])
        try:
            async with asyncio.timeout(self.timeout):
                addresses = await listener.listen(handler)
                yield listener, dialler, addresses[0]
        finally:
            async with asyncio.timeout(self.timeout):
                await dialler.close()
                await listener.close()
        await turn_loop(10)
        left = asyncio.all_tasks() - before
        assert not left, f"tasks were left behind: {left}"


async def turn_loop(turns: int) -> None:
    """Let everything that is ready run, ``turns`` times."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def finish(task: asyncio.Task[object]) -> None:
    """Cancel ``task`` and wait until it is done, however it ends."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


async def receive(stream: Stream) -> bytes:
    """The next message, as bytes that can be compared."""
    return bytes(await stream.receive())


def pattern(size: int, seed: int = 0) -> bytes:
    """``size`` bytes that differ from place to place and from seed to seed."""
    block = bytes((index * 7 + seed * 31 + index // 251) % 256 for index in range(min(size, 4099)))
    return (block * (size // len(block) + 1))[:size] if block else b""


class Flood:
    """Sends messages as fast as the stream takes them, until ``nbytes`` are sent."""

    size = 64 * 1024

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self.count = nbytes // self.size
        self.accepted = 0
        """Bytes of the messages for which `send` has returned."""
        self._patterns = [pattern(self.size, seed) for seed in range(7)]
        self.task: asyncio.Task[None] = asyncio.create_task(self._run(stream))

    def message(self, index: int) -> bytes:
        return self._patterns[index % len(self._patterns)]

    async def stalled(self) -> None:
        """Wait until a moment has passed without progress, or all is sent.

        There is nothing but time to wait for here. On a slow machine less is sent, and the bounds that a test
        then checks hold all the more.
        """
        before = -1
        while self.accepted != before and not self.task.done():
            before = self.accepted
            await asyncio.wait([self.task], timeout=0.15)

    async def failure(self) -> SwarmError | None:
        """What stopped it; None when all was sent."""
        try:
            await self.task
        except SwarmError as exc:
            return exc
        return None

    async def _run(self, stream: Stream) -> None:
        for index in range(self.count):
            await stream.send(self.message(index))
            self.accepted += self.size

"""Two ends of Yamux over pipes in memory, on virtual time."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import trio
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import Yamux
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

PEER = ID(b"peer")
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN = 1

Muxer = TypeVar("Muxer", bound=Yamux)


class Pipe:
    """What a muxer takes for a secured connection."""

    def __init__(self, stream: trio.StapledStream, is_initiator: bool) -> None:
        self.stream = stream
        self.is_initiator = is_initiator

    async def read(self, n: int | None = None) -> bytes:
        try:
            return bytes(await self.stream.receive_some(n))
        except trio.ClosedResourceError:
            return b""

    async def write(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def close(self) -> None:
        await self.stream.aclose()


def virtual(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` with an hour, of which no time is spent waiting."""

    async def bounded() -> None:
        with trio.fail_after(3600):
            await main()

    trio.run(bounded, clock=MockClock(autojump_threshold=0))


@asynccontextmanager
async def pair(
    make: Callable[[Pipe], Yamux],
    pipes: Callable[[], Any] = lockstep_stream_pair,
) -> AsyncIterator[tuple[Yamux, Yamux]]:
    """Two muxers; over a lockstep pipe, whoever writes waits until the other has read that."""
    left, right = pipes()
    ends = make(Pipe(left, True)), make(Pipe(right, False))
    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(end.start)
            await end.event_started.wait()
        yield ends
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def muxer_and_bytes(
    make: Callable[[Pipe], Muxer],
    pipes: Callable[[], Any] = memory_stream_pair,
) -> AsyncIterator[tuple[trio.StapledStream, Muxer]]:
    """A muxer, and the bytes of whoever is at its other end."""
    left, right = pipes()
    muxer = make(Pipe(right, False))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxer.start)
        await muxer.event_started.wait()
        yield left, muxer
        nursery.cancel_scope.cancel()


def header(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length)


async def read_exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


async def busy_both_ways(ends: tuple[Yamux, Yamux], size: int) -> None:
    """Each sends much to the other on a few streams, while both open and answer further ones."""

    async def serve(end: Yamux) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(answer, await end.accept_stream())

    async def answer(stream: Any) -> None:
        with suppress(MuxedStreamError):  # until it is reset
            unanswered = 0
            while data := await stream.read(1 << 16):
                unanswered += len(data)
                while unanswered >= 2000:
                    unanswered -= 2000
                    await stream.write(b"k")

    async def send(end: Yamux) -> None:
        stream = await end.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(size))
            nursery.start_soon(read_exactly, stream, size // 2000)

    async def call(end: Yamux) -> None:
        for _ in range(20):
            stream = await end.open_stream()
            await stream.write(bytes(2000))
            assert await stream.read(1) == b"k"
            await stream.reset()

    async with trio.open_nursery() as servers:
        for end in ends:
            servers.start_soon(serve, end)
        async with trio.open_nursery() as nursery:
            for end in ends:
                for _ in range(3):
                    nursery.start_soon(send, end)
                    nursery.start_soon(call, end)
        servers.cancel_scope.cancel()

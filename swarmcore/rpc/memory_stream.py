"""Streams inside one process: of a peer with itself, and of the memory transport's peers.

They keep the contract of streams to the letter (bounded buffers, half-close, abort) and use neither threads
nor timers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import attrs

from swarmcore.errors import MessageTooLargeError, StreamAbortedError, StreamClosedError, SwarmError
from swarmcore.transport import Buffer, OnStream, Stream, serve_stream
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits

_MESSAGE_OVERHEAD = 64  # what a queued message costs besides its bytes: a flood of empty ones is bounded too
_REASON_LENGTH = 200


@attrs.frozen
class StreamEnd:
    """Whose end of a stream it is."""

    peer: PeerId
    limits: Limits
    open: set[MemoryStream]
    """The streams that are open there."""


def stream_pair(near: StreamEnd, far: StreamEnd) -> tuple[MemoryStream, MemoryStream]:
    """Both ends of a new stream."""
    there, back = Pipe(near.limits.send_buffer), Pipe(far.limits.send_buffer)
    return MemoryStream(near, far.peer, back, there), MemoryStream(far, near.peer, there, back)


class MemoryStream(Stream):
    """One end of a stream inside this process. Each message is copied once, when it is sent."""

    def __init__(self, end: StreamEnd, remote: PeerId, incoming: Pipe, outgoing: Pipe) -> None:
        self.remote = remote
        self.path = "direct"
        self._end = end
        self._incoming = incoming
        self._outgoing = outgoing
        end.open.add(self)

    async def send(self, *buffers: Buffer) -> None:
        size = sum(len(buffer) for buffer in buffers)
        limit = self._end.limits.max_message
        if size > limit:
            raise MessageTooLargeError(
                f"message of {size} bytes is above the limit of {limit}; send it in parts"
            )
        await self._outgoing.put(buffers, size)

    async def receive(self) -> memoryview:
        return await self._incoming.get()

    async def end(self) -> None:
        self._outgoing.end()

    async def close(self) -> None:
        self._outgoing.end()
        self._incoming.drop(
            for_reader=StreamClosedError("the stream was closed on this side"),
            for_writer=StreamClosedError("the remote closed the stream"),
        )
        self._end.open.discard(self)

    def abort(self, reason: str) -> None:
        reason = reason[:_REASON_LENGTH]
        self.drop(StreamClosedError(f"the stream was aborted here: {reason}"), StreamAbortedError(reason))

    def drop(self, seen_here: SwarmError, seen_there: SwarmError) -> None:
        """Lose what is on its way; each side sees its own error. Harmless when it is closed."""
        if self not in self._end.open:
            return  # closed before: what was sent is still to be delivered
        self._incoming.drop(for_reader=seen_here, for_writer=seen_there)
        self._outgoing.drop(for_reader=seen_there, for_writer=seen_here)
        self._end.open.discard(self)

    def __repr__(self) -> str:
        waiting = len(self._incoming.messages)
        return f"<MemoryStream {short(self._end.peer)} ⇄ {short(self.remote)} {waiting} waiting>"


class Loopback:
    """Streams of a peer with itself: the way out and back in need not be open, as behind most routers."""

    def __init__(self, peer: PeerId, limits: Limits, on_stream: OnStream) -> None:
        self._end = StreamEnd(peer, limits, set())
        self._on_stream = on_stream
        self._tasks: set[asyncio.Task[None]] = set()

    def open_stream(self) -> Stream:
        near, far = stream_pair(self._end, self._end)
        task = asyncio.create_task(serve_stream(far, self._on_stream), name="stream of a peer with itself")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return near

    async def close(self, timeout: float, reason: str) -> None:
        """Abort all streams, and give their handlers ``timeout`` seconds to end."""
        for stream in list(self._end.open):
            stream.abort(reason)
        if tasks := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=timeout)


class Pipe:
    """One direction of a stream: messages on their way, bounded in bytes."""

    def __init__(self, bound: int) -> None:
        self.messages: deque[bytearray] = deque()
        self._bound = bound
        self._nbytes = 0
        self._ended = False
        self._reader_error: SwarmError | None = None
        self._writer_error: SwarmError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def put(self, buffers: Sequence[Buffer], size: int) -> None:
        cost = size + _MESSAGE_OVERHEAD
        while True:
            if self._writer_error is not None:
                raise _copy(self._writer_error)
            if self._ended:
                raise StreamClosedError("this side has ended the stream")
            # A message above the bound passes alone: waiting could never make room for it.
            if not self.messages or self._nbytes + cost <= self._bound:
                break
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self.messages.append(bytearray().join(buffers))
        self._nbytes += cost
        _wake(self._reader)

    async def get(self) -> memoryview:
        while not self.messages:
            if self._reader_error is not None:
                raise _copy(self._reader_error)
            if self._ended:
                raise StreamClosedError("the remote ended the stream")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self.messages.popleft()
        self._nbytes -= len(message) + _MESSAGE_OVERHEAD
        _wake(self._writer)
        return memoryview(message)

    def end(self) -> None:
        self._ended = True
        _wake(self._reader)
        _wake(self._writer)

    def drop(self, *, for_reader: SwarmError, for_writer: SwarmError) -> None:
        """Forget what is on its way and fail both ends; the first failure is the one that stays."""
        self._reader_error = self._reader_error or for_reader
        self._writer_error = self._writer_error or for_writer
        self.messages.clear()
        self._nbytes = 0
        _wake(self._reader)
        _wake(self._writer)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _copy(error: SwarmError) -> SwarmError:
    # One exception object raised again and again would gather the traceback of each raise.
    return type(error)(error.message, **error.details)

"""Streams inside one process: of a peer with itself, of the memory transport's peers, of simulated hosts.

They keep the contract of streams to the letter (bounded buffers, half-close, abort) and use neither threads
nor timers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Literal, Self

import attrs

from swarmcore.errors import MessageTooLargeError, StreamAbortedError, StreamClosedError, SwarmError
from swarmcore.transport import Buffer, OnStream, Stream, serve_stream
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits

_MESSAGE_OVERHEAD = 64  # what a queued message costs besides its bytes: a flood of empty ones is bounded too
_REASON_LENGTH = 200

# Only copies of these are raised.
_CLOSED_HERE = StreamClosedError("the stream was closed on this side")
_ENDED_HERE = StreamClosedError("this side has ended the stream")
_CLOSED_THERE = StreamClosedError("the remote closed the stream")


@attrs.frozen
class StreamEnd:
    """Whose end of a stream it is."""

    peer: PeerId
    limits: Limits
    open: dict[Any, None]
    """The streams that are open there, in the order of their opening."""


@attrs.frozen
class Parcel:
    """Something on its way from one end of a stream to the other: a message, or what became of the stream."""

    size: float
    """What it takes of the sender's buffer until it is read."""
    message: bytearray | None = None
    signal: Literal["open", "end", "close", "drop"] = "end"
    error: SwarmError | None = None


class MemoryStream(Stream):
    """One end of a stream inside this process. Each message is copied once, when it is sent.

    What is sent arrives at once; a subclass may let it take its time (`_post`).
    """

    def __init__(self, end: StreamEnd, remote: PeerId) -> None:
        self.remote = remote
        self.path = "direct"
        self.other: Self
        """The other end, until neither hears of the other any more."""
        self._end = end
        self._unread: deque[Parcel] = deque()
        self._unacknowledged = 0.0
        self._read_error: SwarmError | None = None
        self._write_error: SwarmError | None = None
        self._ended_here = self._ended_there = False
        self._open = True
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        end.open[self] = None

    def connect(self, other: Self) -> None:
        """Make this and ``other`` the two ends of one stream."""
        self.other, other.other = other, self

    # --- the stream's own side ------------------------------------------------------------------------

    async def send(self, *buffers: Buffer) -> None:
        size = sum(len(buffer) for buffer in buffers)
        self._check_size(size)
        await self._make_room(size + _MESSAGE_OVERHEAD)
        self._post(Parcel(size + _MESSAGE_OVERHEAD, bytearray().join(buffers)))

    def _check_size(self, size: int) -> None:
        limit = self._end.limits.max_message
        if size > limit:
            raise MessageTooLargeError(
                f"message of {size} bytes is above the limit of {limit}; send it in parts"
            )

    async def _make_room(self, size: float) -> None:
        """Wait until ``size`` more bytes may be on their way or unread, and count them."""
        while True:
            if self._write_error is not None:
                raise _copy(self._write_error)
            if self._ended_here:
                raise _copy(_ENDED_HERE)
            # A message above the bound passes alone: waiting could never make room for it.
            if not self._unacknowledged or self._unacknowledged + size <= self._end.limits.send_buffer:
                break
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self._unacknowledged += size

    async def receive(self) -> memoryview:
        while not self._unread:
            if self._read_error is not None:
                raise _copy(self._read_error)
            if self._ended_there:
                raise StreamClosedError("the remote ended the stream")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        parcel = self._unread.popleft()
        self.other._acknowledge(parcel.size)
        assert parcel.message is not None
        return memoryview(parcel.message)

    async def end(self) -> None:
        if self._open and not self._ended_here:
            self._ended_here = True
            self._signal(Parcel(0, signal="end"))
            _wake(self._writer)

    async def close(self) -> None:
        if self._open:
            self._ended_here = True
            self._signal(Parcel(0, signal="close"))
            self._leave(_CLOSED_HERE, _ENDED_HERE)

    def abort(self, reason: str) -> None:
        reason = reason[:_REASON_LENGTH]
        self.drop(StreamClosedError(f"the stream was aborted here: {reason}"), StreamAbortedError(reason))

    def drop(self, seen_here: SwarmError, seen_there: SwarmError) -> None:
        """Lose what is on its way; each side sees its own error. Harmless when it is closed."""
        if self._open:
            self._signal(Parcel(0, signal="drop", error=seen_there))
            self._leave(seen_here, seen_here)

    # --- the way there --------------------------------------------------------------------------------

    def _post(self, parcel: Parcel) -> None:
        """Bring ``parcel`` to the other end, after those before it."""
        self.other._take(parcel)

    def _signal(self, parcel: Parcel) -> None:
        """The same for what became of the stream, which nobody has to make room for."""
        self._post(parcel)

    def _take(self, parcel: Parcel) -> None:
        """``parcel`` is here."""
        if parcel.message is not None:
            if self._open:
                self._unread.append(parcel)
                _wake(self._reader)
            else:
                self.other._acknowledge(parcel.size)
        elif parcel.signal == "end":
            self._ended_there = True
            _wake(self._reader)
        elif parcel.signal == "close":
            self._ended_there = True
            self._write_error = self._write_error or _CLOSED_THERE
            _wake(self._reader)
            _wake(self._writer)
        elif self._open:
            assert parcel.error is not None
            self._leave(parcel.error, parcel.error)

    def _acknowledge(self, size: float) -> None:
        self._unacknowledged = max(self._unacknowledged - size, 0.0)
        _wake(self._writer)

    def _leave(self, read_error: SwarmError, write_error: SwarmError) -> None:
        self._open = False
        self._read_error = self._read_error or read_error
        self._write_error = self._write_error or write_error
        for parcel in self._unread:
            self.other._acknowledge(parcel.size)
        self._unread.clear()
        _wake(self._reader)
        _wake(self._writer)
        self._end.open.pop(self, None)
        self._part()

    def _part(self) -> None:
        """Forget the other end when both are closed: the two would be a cycle."""
        if not self._open and hasattr(self, "other") and not self.other._open:
            del self.other.other, self.other

    def __repr__(self) -> str:
        waiting = f"{len(self._unread)} waiting"
        return f"<{type(self).__name__} {short(self._end.peer)} ⇄ {short(self.remote)} {waiting}>"


class Loopback:
    """Streams of a peer with itself: the way out and back in need not be open, as behind most routers."""

    def __init__(self, peer: PeerId, limits: Limits, on_stream: OnStream) -> None:
        self._end = StreamEnd(peer, limits, {})
        self._on_stream = on_stream
        self._tasks: set[asyncio.Task[None]] = set()

    def open_stream(self) -> Stream:
        near, far = MemoryStream(self._end, self._end.peer), MemoryStream(self._end, self._end.peer)
        near.connect(far)
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


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _copy(error: SwarmError) -> SwarmError:
    # One exception object raised again and again would gather the traceback of each raise.
    return type(error)(error.message, **error.details)

"""One stream of a faulty transport, and the link to one peer that its streams share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from swarmcore.errors import (
    ConnectionLostError,
    MessageTooLargeError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.transport import Buffer, Stream
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits

_LOST = "the connection was lost"
_DRAIN_TIMEOUT = 5.0
Schedule = Callable[[PeerId, bytearray, float], float | None]


class Link:
    """What all streams with one peer have in common: whether anything passes, and until when it is busy."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.busy_until = 0.0
        self.streams: set[FaultyStream] = set()
        self._passable = asyncio.Event()
        self._passable.set()
        self._lost_after = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether messages pass."""
        return self._passable.is_set()

    async def passable(self) -> None:
        """Wait until messages pass."""
        await self._passable.wait()

    def cut(self, lost_after: float) -> None:
        """Let nothing pass; streams are lost after ``lost_after`` seconds of it."""
        if self.open:
            self._passable.clear()
            self._lost_after = lost_after
            self._start_timer()

    def heal(self) -> None:
        self._passable.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add(self, stream: FaultyStream) -> None:
        self.streams.add(stream)
        if not self.open and self._timer is None:
            self._start_timer()

    def lose_streams(self) -> None:
        self._timer = None
        for stream in list(self.streams):
            stream.lose()

    async def close(self) -> None:
        """Let closed streams pass on what they have, unless nothing passes; then stop all of them."""
        if self._timer is not None:
            self._timer.cancel()
        closing = [asyncio.create_task(stream.drained()) for stream in self.streams if stream.closed]
        if closing and self.open:
            await asyncio.wait(closing, timeout=_DRAIN_TIMEOUT)
        for stream in list(self.streams):
            await stream.stop()
        if closing:
            await asyncio.wait(closing)

    def _start_timer(self) -> None:
        if self.streams:
            self._timer = asyncio.get_running_loop().call_later(self._lost_after, self.lose_streams)


class FaultyStream(Stream):
    """Passes messages on when the link says that they have arrived."""

    def __init__(self, inner: Stream, link: Link, limits: Limits, schedule: Schedule) -> None:
        self.remote = inner.remote
        self.path = inner.path
        self._inner = inner
        self._link = link
        self._limits = limits
        self._schedule = schedule
        self._in_flight: deque[tuple[float, bytearray]] = deque()
        self._nbytes = 0
        self._last_due = 0.0
        self._arrived: deque[memoryview] = deque()
        self._ended = False
        self.closed = False
        self._send_error: SwarmError | None = None
        self._receive_error: SwarmError | None = None
        self._changed = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._receiver: asyncio.Task[None] | None = None
        link.add(self)

    async def send(self, *buffers: Buffer) -> None:
        message = bytearray().join(buffers)
        if len(message) > self._limits.max_message:
            raise MessageTooLargeError(
                f"message of {len(message)} bytes is above the limit of {self._limits.max_message}"
            )
        await self._until(lambda: self._may_send(len(message)))
        now = asyncio.get_running_loop().time()
        due = self._schedule(self.remote, message, now)
        if due is None:
            self.lose()
            raise ConnectionLostError(_LOST)
        self._last_due = max(self._last_due, due)
        self._in_flight.append((self._last_due, message))
        self._nbytes += len(message)
        self._start_sender()

    async def receive(self) -> memoryview:
        if self._receiver is None and self._receive_error is None:
            self._receiver = asyncio.create_task(self._receive_on_time(), name="faulty receive")
        await self._until(self._may_receive)
        message = self._arrived.popleft()
        self._notify()
        return message

    async def end(self) -> None:
        self._ended = True
        self._start_sender()

    async def close(self) -> None:
        if self.closed:
            return
        self._ended = self.closed = True
        self._arrived.clear()
        self._fail_receive(StreamClosedError("the stream was closed on this side"))
        if self._send_error is None:
            self._start_sender()  # which closes the inner stream once everything is passed on
        else:
            await self._release()

    def abort(self, reason: str) -> None:
        if self not in self._link.streams:
            return
        error = StreamClosedError(f"the stream was aborted here: {reason}")
        self._arrived.clear()
        self._fail_receive(error)
        self._fail_send(error)
        if self._link.open:
            self._inner.abort(reason)
            self._link.streams.discard(self)
        # Behind a partition the remote hears nothing until its own side of the stream is lost.

    def lose(self) -> None:
        """Break the stream as a lost connection does; both sides get `ConnectionLostError`."""
        error = ConnectionLostError(f"{_LOST}: {short(self.remote)}")
        self._fail_receive(error)
        self._fail_send(error)
        self._inner.abort(_LOST)
        self._link.streams.discard(self)

    async def drained(self) -> None:
        """Wait until everything sent has been passed on, or cannot be."""
        if self._sender is not None:
            await asyncio.wait([self._sender])

    async def stop(self) -> None:
        """Cancel the stream's tasks."""
        tasks = [task for task in (self._sender, self._receiver) if task is not None]
        error = StreamClosedError("this transport was closed")
        self._fail_receive(error)
        self._fail_send(error)
        self._link.streams.discard(self)
        if tasks:
            await asyncio.wait(tasks)

    def _may_send(self, size: int) -> bool:
        if self._send_error is not None:
            raise type(self._send_error)(self._send_error.message)
        if self._ended:
            raise StreamClosedError("this side has ended the stream")
        return not self._in_flight or self._nbytes + size <= self._limits.send_buffer

    def _may_receive(self) -> bool:
        if not self._arrived and self._receive_error is not None:
            raise type(self._receive_error)(self._receive_error.message)
        return bool(self._arrived)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    def _start_sender(self) -> None:
        self._notify()
        if self._sender is None and self._send_error is None:
            self._sender = asyncio.create_task(self._send_on_time(), name="faulty send")

    async def _send_on_time(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._in_flight or not self._ended:
                await self._until(lambda: bool(self._in_flight) or self._ended)
                if not self._in_flight:
                    break
                due, message = self._in_flight[0]
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._link.passable()
                await self._inner.send(message)
                self._in_flight.popleft()
                self._nbytes -= len(message)
                self._notify()
            await self._link.passable()
            await self._inner.end()
            await self._until(lambda: self.closed)
            await self._link.passable()
            await self._release()
        except SwarmError as exc:
            self._fail_send(_as_lost(exc))
            if self.closed:
                await self._release()

    async def _release(self) -> None:
        await self._inner.close()
        self._link.streams.discard(self)

    async def _receive_on_time(self) -> None:
        try:
            while True:
                message = await self._inner.receive()
                await self._link.passable()
                self._arrived.append(message)
                self._notify()
                await self._until(lambda: not self._arrived)
        except SwarmError as exc:
            self._fail_receive(_as_lost(exc))

    def _fail_send(self, error: SwarmError) -> None:
        self._send_error = self._send_error or error
        self._in_flight.clear()
        self._nbytes = 0
        if self._sender is not None and self._sender is not asyncio.current_task():
            self._sender.cancel()
        self._notify()

    def _fail_receive(self, error: SwarmError) -> None:
        self._receive_error = self._receive_error or error
        if self._receiver is not None and self._receiver is not asyncio.current_task():
            self._receiver.cancel()
        self._notify()


def _as_lost(error: SwarmError) -> SwarmError:
    if isinstance(error, StreamAbortedError) and error.message.startswith(_LOST):
        return ConnectionLostError(error.message)
    return error

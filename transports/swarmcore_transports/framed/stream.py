"""One stream on one connection: whole messages both ways, each direction ended on its own."""

from __future__ import annotations

import asyncio

from swarmcore.errors import (
    MessageTooLargeError,
    ProtocolError,
    ResourceLimitError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.resources import Resource, ResourceManager
from swarmcore.transport import Buffer, Stream
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.flow_control import (
    MESSAGE_COST,
    ReceiveMemory,
    ReceiveQueue,
    StallDetector,
    window_for,
)
from swarmcore_transports.framed.frames import (
    MAX_PART,
    FrameType,
    Settings,
    encode_frame,
    message_header,
    split_message,
)

LINGER_SECONDS = 30.0
"""How long a closed stream waits for the other side to close it too, before the connection is given up."""

_EXTRA_GRANTS = 64
"""Grants beyond one for what each message costs, such as for windows that grow."""

_MAX_JOINED = 64 * 1024
"""Messages up to this size are joined with their header: one copy is cheaper than another TLS record."""


class FramedStream(Stream):
    """Raise `ResourceLimitError` when there is no memory for another stream of the peer."""

    def __init__(
        self, connection: Connection, remote: PeerId, limits: Limits, resources: ResourceManager
    ) -> None:
        self.remote = remote
        self.path = connection.path
        self._connection = connection
        self._max_message = min(limits.max_message, connection.settings.max_message)
        self._part = min(MAX_PART, connection.settings.window // 2)
        self._credit = connection.settings.window
        self._spent = self._grants = 0
        window = Settings.of(limits).window
        self._queue = ReceiveQueue(window, window_for(limits.send_buffer))
        self._resources = resources
        self._memory = ReceiveMemory(resources, remote, window, self._queue, self._grant)
        self._stall_detector = StallDetector()
        self._send_lock = asyncio.Lock()
        self._sender: asyncio.Future[None] | None = None
        self._receiver: asyncio.Future[None] | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._mid_message = False  # a message was begun and is not finished
        self._ended = False
        self._closed = False
        self._remote_ended = False
        self._remote_closed = False
        self._error: SwarmError | None = None
        connection.attach(self)

    def __repr__(self) -> str:
        state = (
            "closed"
            if self._closed
            else "broken"
            if self._error
            else "half-closed"
            if self._ended
            else "open"
        )
        return (
            f"<FramedStream {short(self.remote)} {state} · {len(self._queue)} unread · credit {self._credit}>"
        )

    # --- the application's side -----------------------------------------------------------------------

    async def send(self, *buffers: Buffer) -> None:
        total = sum(map(len, buffers))
        if total > self._max_message:
            raise MessageTooLargeError(
                f"a message of {total} bytes is above the limit of {self._max_message}; send smaller pieces"
            )
        async with self._send_lock:
            self._check_sendable()
            if total <= min(_MAX_JOINED, self._part):
                await self._wait_for_credit(total + MESSAGE_COST)
                self._connection.write(b"".join((message_header(total), *buffers)))
                return
            try:
                for length, frame in split_message(buffers, total, self._part):
                    await self._wait_for_credit(length if self._mid_message else length + MESSAGE_COST)
                    self._connection.write(*frame)
                    self._mid_message = True
                self._mid_message = False
            finally:
                if self._mid_message and not (self._closed or self._error or self._remote_closed):
                    self.abort("the sender was cancelled in the middle of a message")

    async def _wait_for_credit(self, cost: int) -> None:
        """Wait until ``cost`` may be sent and the socket keeps up, then spend it."""
        while self._credit < cost or not self._connection.writable:
            self._sender = asyncio.get_running_loop().create_future()
            try:
                await self._sender
            finally:
                self._sender = None
            self._check_sendable()
        self._credit -= cost
        self._spent += cost

    def _check_sendable(self) -> None:
        if self._closed or self._ended:
            raise StreamClosedError("this side has closed the stream for sending")
        if self._error:
            raise _fresh_copy(self._error)
        if self._remote_closed:
            raise StreamClosedError(f"peer {short(self.remote)} has closed the stream")

    async def receive(self) -> memoryview:
        self._memory.release_taken()
        while True:
            if self._closed:
                raise StreamClosedError("this side has closed the stream")
            if self._queue:
                message = self._queue.take()
                self._memory.message_taken()
                self._look_for_wait_for_credit()
                return message
            if self._remote_ended:
                raise StreamClosedError(f"peer {short(self.remote)} has ended the stream")
            if self._error:
                raise _fresh_copy(self._error)
            self._receiver = asyncio.get_running_loop().create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None

    async def end(self) -> None:
        async with self._send_lock:
            if not (self._ended or self._closed or self._error or self._remote_closed):
                self._connection.write(encode_frame(FrameType.END))
            self._ended = True

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.discard()
        self._wake_both()
        if self._error:
            return
        if self._mid_message:
            self._connection.retire("the stream was closed in the middle of a message")
            return
        self._connection.write(encode_frame(FrameType.CLOSE))
        if self._remote_closed:
            self._connection.stream_closed()
        else:
            loop = asyncio.get_running_loop()
            self._linger_timer = loop.call_later(
                LINGER_SECONDS, self._connection.retire, "the stream was closed"
            )

    def abort(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.discard()
        self._wake_both()
        if not self._error:
            self._connection.retire(reason)

    # --- the connection's side ------------------------------------------------------------------------

    def frame_received(self, frame: FrameType, value: int) -> None:
        if frame is FrameType.CREDIT:
            self._grants += 1
            if self._grants > _EXTRA_GRANTS + self._spent // MESSAGE_COST:
                raise ProtocolError("the peer floods this one with credit")
            self._credit += value
            self.wake()
        elif frame in (FrameType.END, FrameType.CLOSE):
            if self._remote_closed or (self._remote_ended and frame is FrameType.END):
                raise ProtocolError(f"{frame.name} after the end")
            self._remote_ended = True
            self._remote_closed = frame is FrameType.CLOSE
            self._wake_both()
            if self._remote_closed and self._closed:
                self._connection.stream_closed()
        else:
            raise ProtocolError(f"{frame.name} inside a stream")

    def part_announced(self, length: int, *, total: int | None) -> None:
        if self._remote_ended:
            raise ProtocolError("a message after the end")
        self._queue.charge(length, total=total)
        self._look_for_wait_for_credit()

    def _look_for_wait_for_credit(self) -> None:
        if not (self._closed or self._error):
            try:
                self._memory.reserve()
            except ResourceLimitError as exc:
                self._connection.retire(exc.message, exc)
        self._grant()

    def message_received(self, message: memoryview) -> None:
        self._queue.put(message)
        self._memory.message_arrived()
        self._wake(self._receiver)

    def stalled(self, now: float, message: int, got: int, *, announced: bool) -> bool:
        """Whether the message under way comes too slowly, as in `StallDetector.stalled`.

        ``announced`` when bytes are missing for which the sender has spent its credit.
        """
        due = announced or self._queue.sender_can_continue
        under_pressure = self._resources.waiting(Resource.BYTES) > 0
        return self._stall_detector.stalled(now, message, got, due=due, under_pressure=under_pressure)

    def detached(self) -> None:
        """The connection carries this stream no more: what it held is free."""
        self._stop_lingering()
        self._memory.release()

    def aborted(self, reason: str) -> None:
        """The other side dropped the stream; after its orderly close that is only the connection going."""
        if not self._remote_closed:
            self._queue.discard()
            self._fail(StreamAbortedError(reason))

    def connection_lost(self, error: SwarmError) -> None:
        self.detached()
        self._fail(error)

    def wake(self) -> None:
        """The sender may go on."""
        self._wake(self._sender)

    def _fail(self, error: SwarmError) -> None:
        self._error = self._error or error
        self._wake_both()

    def _grant(self) -> None:
        if not (self._closed or self._error or self._remote_ended) and (credit := self._queue.grant()):
            self._connection.write(encode_frame(FrameType.CREDIT, value=credit))

    def _stop_lingering(self) -> None:
        if self._linger_timer:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _wake_both(self) -> None:
        self._wake(self._sender)
        self._wake(self._receiver)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter and not waiter.done():
            waiter.set_result(None)


def _fresh_copy(error: SwarmError) -> SwarmError:
    """A fresh copy to raise: one instance raised twice would collect both tracebacks."""
    copy = type(error)(error.message, **error.details)
    copy.__cause__ = error.__cause__
    return copy

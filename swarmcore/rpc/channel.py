"""A two-way channel of records and tensors between two peers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any

from swarmcore.errors import InputError, StreamClosedError, SwarmError
from swarmcore.transport import Stream
from swarmcore.types import PeerId, short
from swarmcore.wire.failure import Failure, to_error, to_failure
from swarmcore.wire.framing import Message, decode_message, encode_message, kinds_of
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor


class Channel:
    """One open channel, the same class at both ends.

    `send` and `receive` may each be used by one task at a time. As a context manager it closes the channel at
    the end of the block, or aborts it when the block raises or is cancelled.
    """

    remote: PeerId
    """The peer at the other end, proven by the transport."""
    path: str
    """How the bytes travel: ``"direct"``, ``"hole-punched"`` or ``"relayed"``."""
    opening: Message
    """The message that opened the channel."""

    def __init__(
        self,
        stream: Stream,
        opening: Message,
        limits: Limits,
        *,
        sends: Iterable[type],
        receives: Iterable[type],
        receive: Callable[[], Awaitable[memoryview]] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.remote = stream.remote
        self.path = stream.path
        self.opening = opening
        self._stream = stream
        self._limits = limits
        self._sends = frozenset(sends)
        self._kinds = kinds_of(*receives, Failure)
        self._receive = receive or stream.receive
        self._on_close = on_close or _nothing
        self.remote_end: SwarmError | None = None
        """What `receive` raised at the end of the remote's messages."""

    async def send(self, record: Any, *tensors: Tensor) -> None:
        """Send one message; wait while the other side is slow to read.

        Raise `MessageTooLargeError` (nothing was sent), or `StreamClosedError`, `StreamAbortedError`,
        `ConnectionLostError` when the channel is gone; `receive` then says why, if the remote gave a reason.
        """
        if type(record) not in self._sends:
            raise InputError(f"this end of the channel does not send {type(record).__name__} records")
        await self._stream.send(*encode_message(record, tensors, self._limits))

    async def receive(self) -> Message:
        """Wait for the next message; its tensors are views into memory that the caller then owns.

        Raise `StreamClosedError` at the remote's orderly end, the remote's own error when it failed,
        `ProtocolError` for a message that has no place here.
        """
        try:
            data = await self._receive()
        except SwarmError as error:
            self.remote_end = error
            raise
        message = decode_message(data, self._kinds, self._limits)
        if isinstance(message.record, Failure):
            self.remote_end = to_error(message.record, self.remote)
            raise self.remote_end
        return message

    async def fail(self, error: SwarmError) -> None:
        """Tell the other side, whose `receive` raises the same error, and end this side."""
        await self._stream.send(*encode_message(to_failure(error), (), self._limits))
        await self._stream.end()

    async def end(self) -> None:
        """Half-close: the remote's `receive` ends after what was sent; its messages still arrive here."""
        await self._stream.end()

    async def close(self) -> None:
        """Release the channel in good order: what was sent is delivered, what comes in is dropped."""
        self._close()
        await self._stream.close()

    def abort(self, reason: str) -> None:
        """Drop the channel at once; the other side's handler is cancelled."""
        self._close()
        self._stream.abort(reason)

    def _close(self) -> None:
        on_close, self._on_close = self._on_close, _nothing
        on_close()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            await self.close()
        else:
            self.abort(f"the other side gave up: {type(exc).__name__}")

    def __repr__(self) -> str:
        return f"<Channel {self.opening.kind} {short(self.remote)} {self.path}>"


def _nothing() -> None:
    pass


MAX_AHEAD = 8
"""Messages that wait for the handler before the stream is left to push back on the sender."""
MAX_AHEAD_BYTES = 2**20
"""The same in bytes; a single message may be larger."""


class ReadAhead:
    """Receives a stream's messages into a bounded queue, in one task for the whole life of the stream.

    ``on_lost`` is called once when the stream breaks or is aborted, and is expected to cancel whoever waits
    in `receive`: a handler that got an error *and* a cancellation would have its clean-up cut short. An
    orderly end is no loss, the remote may still wait for answers. A loss is seen at once unless as many
    messages as are read ahead wait for the handler.
    """

    def __init__(self, stream: Stream, on_lost: Callable[[SwarmError], None]) -> None:
        self._stream = stream
        self._on_lost: Callable[[SwarmError], None] | None = on_lost
        self._messages: deque[memoryview] = deque()
        self._nbytes = 0
        self._end: SwarmError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._run(), name="read ahead")

    async def receive(self) -> memoryview:
        """As `Stream.receive`."""
        while not self._messages:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message = self._messages.popleft()
        self._nbytes -= message.nbytes
        self._room.set()
        return message

    def disarm(self) -> None:
        """From now on this side is ending the stream itself: its end is no loss."""
        self._on_lost = None

    async def stop(self) -> None:
        """Stop reading; what was read and not received is dropped."""
        if (task := self._task) is not None:
            # Errors hold the frames they passed through, which hold this object, and all that the peer has
            # sent: nothing here may hold an error in turn, or it stays until garbage is looked for.
            self._task = self._on_lost = None
            task.cancel()
            await asyncio.wait([task])
            self._messages.clear()
            self._end = StreamClosedError("nothing more is read of the stream")

    async def _run(self) -> None:
        try:
            while True:
                message = await self._stream.receive()
                self._messages.append(message)
                self._nbytes += message.nbytes
                self._wake()
                while len(self._messages) >= MAX_AHEAD or self._nbytes >= MAX_AHEAD_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except SwarmError as error:
            self._end = error
            if self._on_lost is None or isinstance(error, StreamClosedError):
                self._wake()
            else:
                self._on_lost(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

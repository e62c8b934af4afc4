"""A two-way channel of records and tensors between two peers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any

from swarmcore.errors import InputError, SwarmError
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

"""One stream is one socket: frames of ``u8 kind | u32 length``, and the kernel's flow control."""

from __future__ import annotations

import asyncio
import struct
from collections import deque

from swarmcore.errors import (
    ConnectionLostError,
    MessageTooLargeError,
    ProtocolError,
    StreamAbortedError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.transport import Buffer, Stream
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits

_HEADER = struct.Struct("<BI")
_MESSAGE, _END, _ABORT = range(3)
_MAX_REASON = 200


class UnixStream(Stream):
    """`run` has to run in a task for as long as the stream lives; it reads the socket."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: PeerId, limits: Limits
    ) -> None:
        self.remote = remote
        self.path = "direct"
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._send_lock = asyncio.Lock()
        self._messages: deque[memoryview] = deque()
        self._unread = 0
        self._changed = asyncio.Event()
        self._hung_up = asyncio.Event()
        self._ended = self._closed = self._remote_ended = False
        self._error: SwarmError | None = None

    async def send(self, *buffers: Buffer) -> None:
        total = sum(map(len, buffers))
        if total > self._limits.max_message:
            raise MessageTooLargeError(f"{total} bytes are above the limit of {self._limits.max_message}")
        async with self._send_lock:
            self._check_sendable()
            await self._drain()
            self._check_sendable()
            # One write of a copy: a message is under way as a whole or not at all, whatever is cancelled.
            self._writer.write(b"".join((_HEADER.pack(_MESSAGE, total), *buffers)))

    async def _drain(self) -> None:
        """Wait until the socket keeps up, or the stream is given up here."""
        if not self._writer.transport.get_write_buffer_size():
            return
        draining = asyncio.ensure_future(self._writer.drain())
        hung_up = asyncio.ensure_future(self._hung_up.wait())
        try:
            await asyncio.wait((draining, hung_up), return_when=asyncio.FIRST_COMPLETED)
            if draining.done() and draining.exception():
                self._check_sendable()
                raise ConnectionLostError(f"the connection to {short(self.remote)} broke")
        finally:
            draining.cancel()
            hung_up.cancel()

    def _check_sendable(self) -> None:
        if self._closed or self._ended:
            raise StreamClosedError("this side has closed the stream for sending")
        if self._error:
            raise type(self._error)(self._error.message)

    async def receive(self) -> memoryview:
        while True:
            if self._closed:
                raise StreamClosedError("this side has closed the stream")
            if self._messages:
                message = self._messages.popleft()
                self._unread -= len(message)
                self._notify()
                return message
            if self._error:
                raise type(self._error)(self._error.message)
            if self._remote_ended:
                raise StreamClosedError(f"peer {short(self.remote)} has ended the stream")
            await self._change()

    async def end(self) -> None:
        async with self._send_lock:
            self._end()

    def _end(self) -> None:
        if not self._ended and not self._error:
            self._writer.write(_HEADER.pack(_END, 0))
        self._ended = True

    async def close(self) -> None:
        if self._closed:
            return
        self._end()
        self._hang_up()

    def abort(self, reason: str) -> None:
        if self._closed:
            return
        encoded = reason[:_MAX_REASON].encode()
        self._writer.write(_HEADER.pack(_ABORT, len(encoded)) + encoded)
        self._hang_up()

    def _hang_up(self) -> None:
        """Nothing more to say; `run` goes on reading, so that the kernel does not drop our last words."""
        self._closed = True
        self._messages.clear()
        self._unread = 0
        if not self._writer.is_closing():
            self._writer.write_eof()
        self._hung_up.set()
        self._notify()

    def _break(self, error: SwarmError) -> None:
        self._error = self._error or error
        self._writer.transport.abort()
        self._notify()

    def drop(self, reason: str) -> None:
        """Abort, or, when that was closed before, only make sure that the socket goes."""
        self.abort(reason)
        self._writer.close()

    # --- the reading side -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until the other side hangs up and the stream is closed here too; then let go of the socket."""
        try:
            while await self._read_frame():
                pass
            while not self._closed:
                await self._change()
        except (OSError, EOFError) as exc:
            self._break(ConnectionLostError(f"the connection to {short(self.remote)} broke: {exc}"))
        except SwarmError as exc:
            self._messages.clear()
            self._break(exc)
        finally:
            self._writer.close()

    async def _read_frame(self) -> bool:
        try:
            header = await self._reader.readexactly(_HEADER.size)
        except asyncio.IncompleteReadError as exc:
            if exc.partial or not self._remote_ended:
                raise
            return False  # end of file, after END
        kind, length = _HEADER.unpack(header)
        if kind == _MESSAGE and not self._remote_ended and length <= self._limits.max_message:
            message = memoryview(bytearray(await self._reader.readexactly(length)))
            if not self._closed:
                self._messages.append(message)
                self._unread += length
                self._notify()
            while self._unread > self._limits.send_buffer and not self._closed:
                await self._change()
        elif kind == _END and not length:
            self._remote_ended = True
            self._notify()
        elif kind == _ABORT and length <= 4 * _MAX_REASON:
            raise StreamAbortedError((await self._reader.readexactly(length)).decode(errors="replace"))
        else:
            raise ProtocolError(f"peer {short(self.remote)} sent a frame of kind {kind}, {length} bytes")
        return True

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

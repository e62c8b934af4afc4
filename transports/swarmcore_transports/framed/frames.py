"""Frames inside one connection, and the reader that receives messages straight into their own memory.

A frame is ``u8 kind | u32 length | u32 value``, little-endian, and ``length`` bytes. A message travels as one
``MESSAGE`` frame whose value is the length of the whole message, and as many ``MORE`` frames as it takes:
between two parts there is memory for a credit, a heartbeat or an abort.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Protocol

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.transport import Buffer
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.flow_control import FIRST_WINDOW, MIN_WINDOW, window_for

MAX_PART = 256 * 1024
"""Most message bytes in one frame."""

_HEADER = struct.Struct("<BII")
_SCRATCH = 16 * 1024
_MAX_BODY = 1024


class FrameType(IntEnum):
    HELLO = 1  # listener: a challenge and its settings
    PROOF = 2  # dialler: its peer id, the signed challenge and its settings
    OPEN = 3  # dialler: a stream begins on this connection
    MESSAGE = 4
    MORE = 5
    CREDIT = 6  # value: bytes of messages the other side may send on top of what it was granted before
    END = 7  # no more messages from this side of the stream
    CLOSE = 8  # END, and whatever still comes in is dropped; after both sides' the connection is free again
    ABORT = 9  # body: the reason; the other side drops the connection
    HEARTBEAT = 10
    DISMISS = 11  # listener: the dialler should drop this idle connection; one that just sent OPEN is kept
    RESUME = 12  # body: a connection's token; on a fresh transport, which is to carry that connection
    MOVE = 13  # this side's last frame on the old transport: it goes on on the new one


_WITH_BODY = (FrameType.HELLO, FrameType.PROOF, FrameType.ABORT, FrameType.RESUME)


def encode_frame(frame: FrameType, body: bytes = b"", value: int = 0) -> bytes:
    """A whole frame."""
    return _HEADER.pack(frame, len(body), value) + body


def message_header(length: int) -> bytes:
    """What goes before a message that travels in one part."""
    return _HEADER.pack(FrameType.MESSAGE, length, length)


def split_message(buffers: tuple[Buffer, ...], total: int, part: int) -> Iterator[tuple[int, list[Buffer]]]:
    """The frames of a message of ``total`` bytes: for each its length in message bytes and its buffers.

    Nothing is copied; each frame carries ``part`` bytes, the last one the rest.
    """
    views = [memoryview(buffer) for buffer in buffers]
    sent = at = offset = 0
    while sent < total:
        length = min(part, total - sent)
        frame: list[Buffer] = [
            _HEADER.pack(FrameType.MORE if sent else FrameType.MESSAGE, length, 0 if sent else total)
        ]
        missing = length
        while missing:
            piece = views[at][offset : offset + missing]
            if piece:
                frame.append(piece)
            missing -= len(piece)
            offset += len(piece)
            if offset == len(views[at]):
                at, offset = at + 1, 0
        sent += length
        yield length, frame


class FrameHandler(Protocol):
    """Who is told what a `FrameReader` finds. Each method may raise `ProtocolError`."""

    def frame_received(self, frame: FrameType, value: int, body: bytes) -> None: ...

    def part_announced(self, length: int, *, total: int | None) -> None:
        """The header of ``length`` message bytes has come, nothing has been allocated for them yet.

        ``total`` is the length of the whole message, told with its first part alone.
        """

    def message_received(self, message: memoryview) -> None: ...


class FrameReader:
    """Cuts a byte stream into frames; the caller reads from its socket into `get_buffer`.

    Short frames are taken from a scratch buffer. The bytes of a message past the first few go straight into
    the message. The header of its next part lands right behind them, where it is read and then overwritten by
    that part: a big message takes one read per part. Memory for a message grows with what has arrived and
    with the part that comes, to which the handler has agreed; the claimed length of the whole brings nothing.
    """

    def __init__(self, handler: FrameHandler, max_message: int) -> None:
        self._handler = handler
        self._max_message = max_message
        self._scratch = bytearray(_SCRATCH)
        self._filled = 0
        self._message: bytearray | None = None
        self._total = 0
        self._got = 0
        self._part_left = 0
        self._header_got = 0
        self._number = 0

    @property
    def partial_message(self) -> tuple[int, int] | None:
        """The number of the message that has begun and is not whole, and how many bytes of it are here."""
        return None if self._message is None else (self._number, self._got)

    @property
    def part_is_missing(self) -> bool:
        """Whether bytes are to come that the sender has announced already."""
        return self._part_left > 0

    def forget(self) -> None:
        """Let go of the message under way; what comes after it can be read no more."""
        self._message = None

    def get_buffer(self) -> memoryview:
        """Where the next bytes go. Never empty; not to be kept past the next `received`."""
        if self._message is None or not (self._part_left or self._header_got):
            return memoryview(self._scratch)[self._filled :]
        end = self._got + self._part_left
        if end < self._total:
            end += _HEADER.size
        self._reserve(self._message, end)
        return memoryview(self._message)[self._got + self._header_got : end]

    def received(self, count: int) -> None:
        """``count`` bytes were written into the last buffer. Raise `ProtocolError` if they are no frames."""
        if self._message is not None and (self._part_left or self._header_got):
            self._received_in_message(self._message, count)
        else:
            self._filled += count
        if self._filled:
            self._read_scratch()

    def _received_in_message(self, message: bytearray, count: int) -> None:
        taken = min(count, self._part_left)
        self._got += taken
        self._part_left -= taken
        self._header_got += count - taken
        if self._part_left:
            return
        if self._got == self._total:
            self._finish(message)
        elif self._header_got == _HEADER.size:
            self._header_got = 0
            kind, length, _ = header = _HEADER.unpack_from(message, self._got)
            if kind in _WITH_BODY:
                self._scratch[: _HEADER.size] = _HEADER.pack(*header)
                self._filled = _HEADER.size
            else:
                self._begin(kind, length, header[2], b"")

    def _read_scratch(self) -> None:
        position = 0
        scratch = memoryview(self._scratch)
        while True:
            if self._message is not None and self._part_left:
                taken = min(self._part_left, self._filled - position)
                self._reserve(self._message, self._got + taken)
                self._message[self._got : self._got + taken] = scratch[position : position + taken]
                position += taken
                self._got += taken
                self._part_left -= taken
                if self._part_left:
                    break
                if self._got == self._total:
                    self._finish(self._message)
            if self._filled - position < _HEADER.size:
                break
            kind, length, value = _HEADER.unpack_from(scratch, position)
            body = length if kind in _WITH_BODY else 0
            if body > _MAX_BODY:
                raise ProtocolError(f"a frame of kind {kind} claims {length} bytes")
            if self._filled - position < _HEADER.size + body:
                break
            position += _HEADER.size
            self._begin(kind, length, value, bytes(scratch[position : position + body]))
            position += body
        if rest := self._filled - position:
            scratch[:rest] = bytes(scratch[position : self._filled])
        self._filled = rest

    def _begin(self, kind: int, length: int, value: int, body: bytes) -> None:
        if kind == FrameType.MESSAGE:
            if self._message is not None:
                raise ProtocolError("a message begins inside another")
            if value > self._max_message:
                raise ProtocolError(f"a message of {value} bytes is above the limit of {self._max_message}")
            self._check_part(length, value)
            self._handler.part_announced(length, total=value)
            self._number += 1
            self._message = bytearray(min(value, length + _HEADER.size))
            self._total, self._got, self._part_left = value, 0, length
            if not value:
                self._finish(self._message)
        elif kind == FrameType.MORE:
            if self._message is None:
                raise ProtocolError("a part without a message")
            self._check_part(length, self._total - self._got)
            self._handler.part_announced(length, total=None)
            self._part_left = length
        else:
            if kind not in FrameType.__members__.values():
                raise ProtocolError(f"a frame of unknown kind {kind}")
            if length != len(body):
                raise ProtocolError(f"a frame of kind {kind} with {length} bytes")
            if self._message is not None and kind in (FrameType.OPEN, FrameType.END, FrameType.CLOSE):
                raise ProtocolError(f"{FrameType(kind).name} in the middle of a message")
            self._handler.frame_received(FrameType(kind), value, body)

    def _check_part(self, length: int, missing: int) -> None:
        if length > min(missing, MAX_PART) or (not length and missing):
            raise ProtocolError(f"a part of {length} bytes where {missing} are missing")

    def _finish(self, message: bytearray) -> None:
        self._message = None
        self._handler.message_received(memoryview(message)[: self._total])

    def _reserve(self, message: bytearray, size: int) -> None:
        # By doubling: never more than twice what has arrived, or the part that comes.
        if size > len(message):
            message.extend(bytes(max(size, min(2 * len(message), self._total)) - len(message)))


_SETTINGS = struct.Struct("<III")

SETTINGS_BYTES = _SETTINGS.size


@attrs.frozen
class Settings:
    """What a side asks of the other."""

    max_message: int
    """Largest message it takes, in bytes."""
    window: int
    """Credit it grants when a stream opens, in bytes."""
    heartbeat: float
    """Seconds it may be left without any byte; whole milliseconds on the wire."""

    @classmethod
    def of(cls, limits: Limits) -> Settings:
        return cls(
            min(limits.max_message, 2**32 - 1),
            min(window_for(limits.send_buffer), FIRST_WINDOW),
            limits.keepalive,
        )

    def encode(self) -> bytes:
        return _SETTINGS.pack(self.max_message, self.window, min(int(self.heartbeat * 1000), 2**32 - 1))

    @classmethod
    def decode(cls, data: bytes) -> Settings:
        """``data`` is `SETTINGS_BYTES` long. Raise `ProtocolError` when it asks for what cannot work."""
        max_message, window, heartbeat = _SETTINGS.unpack(data)
        if window < MIN_WINDOW:
            raise ProtocolError(f"the peer grants {window} bytes, fewer than {MIN_WINDOW}")
        return cls(max_message, window, heartbeat / 1000)

"""One message: ``u32 header length | msgpack header | tensor bytes …``, all little-endian.

The header names the record (``kind``), holds its fields, and describes the tensors that follow. Unknown
fields are ignored, so that a record can grow; an unknown kind is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec

from swarmcore.errors import MessageTooLargeError, ProtocolError
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor, TensorHeader, check_header

Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct("<I")
_TENSOR_ALIGNMENT = 64


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a message says of itself. An array on the wire; older peers ignore entries added at its end."""

    kind: str
    """Class name of the record."""
    body: msgspec.Raw
    """The record's fields."""
    tensors: tuple[TensorHeader, ...] = ()
    method: str = ""
    """In the first message of a stream: the method or protocol that the stream is for."""
    timeout: float | None = None
    """In the first message of a call: seconds the caller still waits for the reply."""


@attrs.frozen
class Message:
    """A decoded message: its record and the tensors beside it (still encoded, views into the message)."""

    kind: str
    record: Any
    tensors: tuple[Tensor, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``. Raise `ProtocolError` when the message has none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise ProtocolError(f"message {self.kind!r} lacks its tensor {name!r}")


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_record_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def encode_record(record: Any) -> bytes:
    """An attrs record as msgpack."""
    return _encoder.encode(record)


def decode_record(data: Buffer | msgspec.Raw, record_type: type) -> Any:
    """The inverse of `encode_record`. Raise `ProtocolError` when the bytes are not such a record."""
    decoder = _record_decoders.get(record_type)
    if decoder is None:
        decoder = _record_decoders[record_type] = msgspec.msgpack.Decoder(record_type)
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as exc:
        raise ProtocolError(f"malformed {record_type.__name__}: {exc}") from exc


def encode_message(
    record: Any, tensors: Sequence[Tensor], limits: Limits, *, method: str = "", timeout: float | None = None
) -> list[Buffer]:
    """The buffers of one message, its kind the record's class name; tensor data is passed on, not copied.

    ``method`` and ``timeout`` belong to the first message of a stream, see `Header`. Raise
    `MessageTooLargeError` when the message is above ``limits.max_message``.
    """
    kind = type(record).__name__
    body = msgspec.Raw(_encoder.encode(record))
    header = Header(kind, body, tuple(t.header() for t in tensors), method, timeout)
    encoded = _encoder.encode(header)
    # Padding puts the first tensor on an aligned offset, so that it can be used where it was received.
    padding = -(_LENGTH.size + len(encoded)) % _TENSOR_ALIGNMENT if tensors else 0
    total = _LENGTH.size + len(encoded) + padding + sum(t.data.nbytes for t in tensors)
    if total > limits.max_message or len(encoded) > limits.max_header:
        raise MessageTooLargeError(
            f"message {kind!r} takes {total} bytes (header {len(encoded)}), above the limit of "
            f"{limits.max_message} (header {limits.max_header}); send it in smaller pieces"
        )
    start = _LENGTH.pack(len(encoded)) + encoded + bytes(padding)
    return [start, *(t.data.cast("B") if t.data.format != "B" else t.data for t in tensors)]


def kinds_of(*record_types: type) -> dict[str, type]:
    """Records by the name they have on the wire."""
    return {record_type.__name__: record_type for record_type in record_types}


def decode_header(data: memoryview, limits: Limits) -> Header:
    """The header of a message alone: what an acceptor needs to know before it can read the rest."""
    return _read_header(data, limits)[0]


def decode_message(data: memoryview, kinds: Mapping[str, type], limits: Limits) -> Message:
    """Read one message whose record is of one of ``kinds``.

    Tensors are views into ``data``. Raise `ProtocolError` for anything that is not exactly such a message
    within ``limits``; nothing is allocated in proportion to a size that was only claimed.
    """
    header, end = _read_header(data, limits)
    record_type = kinds.get(header.kind)
    if record_type is None:
        raise ProtocolError(f"unexpected message {header.kind!r}; expected one of {', '.join(kinds)}")
    record = decode_record(header.body, record_type)
    tensors = _slice_tensors(data, end, header.tensors, limits)
    return Message(header.kind, record, tensors)


def _read_header(data: memoryview, limits: Limits) -> tuple[Header, int]:
    if data.nbytes < _LENGTH.size:
        raise ProtocolError(f"a message of {data.nbytes} bytes is too short")
    (length,) = _LENGTH.unpack_from(data)
    if length > limits.max_header or _LENGTH.size + length > data.nbytes:
        raise ProtocolError(f"message header of {length} bytes does not fit the message or the limit")
    try:
        header = _header_decoder.decode(data[_LENGTH.size : _LENGTH.size + length])
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as exc:
        raise ProtocolError(f"malformed message header: {exc}") from exc
    return header, _LENGTH.size + length


def _slice_tensors(
    data: memoryview, offset: int, headers: tuple[TensorHeader, ...], limits: Limits
) -> tuple[Tensor, ...]:
    if len(headers) > limits.max_tensors:
        raise ProtocolError(f"{len(headers)} tensors in one message, above the limit of {limits.max_tensors}")
    if headers:
        offset += -offset % _TENSOR_ALIGNMENT
    tensors = []
    for header in headers:
        check_header(header, limits)
        if offset + header.nbytes > data.nbytes:
            raise ProtocolError(f"tensor {header.name!r} reaches past the end of the message")
        view = data[offset : offset + header.nbytes]
        tensors.append(Tensor(header.name, header.dtype, header.shape, view, header.codec))
        offset += header.nbytes
    if offset != data.nbytes:
        raise ProtocolError(f"{data.nbytes - offset} bytes are left over after the message")
    return tuple(tensors)

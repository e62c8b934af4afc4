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


@attrs.frozen
class Header:
    kind: str
    body: msgspec.Raw
    tensors: tuple[TensorHeader, ...] = ()


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


def encode_message(record: Any, tensors: Sequence[Tensor], limits: Limits) -> list[Buffer]:
    """The buffers of one message, its kind the record's class name; tensor data is passed on, not copied.

    Raise `MessageTooLargeError` when the message is above ``limits.max_message``.
    """
    kind = type(record).__name__
    header = Header(kind, msgspec.Raw(_encoder.encode(record)), tuple(t.header() for t in tensors))
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


def decode_message(data: memoryview, kinds: Mapping[str, type], limits: Limits) -> Message:
    """Read one message whose record is of one of ``kinds``.

    Tensors are views into ``data``. Raise `ProtocolError` for anything that is not exactly such a message
    within ``limits``; nothing is allocated in proportion to a size that was only claimed.
    """
    if data.nbytes < _LENGTH.size:
        raise ProtocolError(f"a message of {data.nbytes} bytes is too short")
    (length,) = _LENGTH.unpack_from(data)
    if length > limits.max_header or _LENGTH.size + length > data.nbytes:
        raise ProtocolError(f"message header of {length} bytes does not fit the message or the limit")
    try:
        header = _header_decoder.decode(data[_LENGTH.size : _LENGTH.size + length])
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as exc:
        raise ProtocolError(f"malformed message header: {exc}") from exc
    record_type = kinds.get(header.kind)
    if record_type is None:
        raise ProtocolError(f"unexpected message {header.kind!r}; expected one of {', '.join(kinds)}")
    record = decode_record(header.body, record_type)
    tensors = _slice_tensors(data, _LENGTH.size + length, header.tensors, limits)
    return Message(header.kind, record, tensors)


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

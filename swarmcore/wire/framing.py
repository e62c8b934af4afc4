"""One message: ``u32 header length | msgpack header | tensor bytes …``, all little-endian.

The header names the record (``kind``), holds its fields, and describes the tensors that follow, each of which
starts at a multiple of 64 bytes. Unknown fields are ignored, so that a record can grow; an unknown kind is
refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import attrs
import msgspec

from swarmcore.errors import MessageTooLargeError, ProtocolError
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Name, Tensor, TensorHeader, check_headers

Buffer = bytes | bytearray | memoryview
Record = TypeVar("Record")

_LENGTH = struct.Struct("<I")
_ALIGNMENT = 64
_PADDING = [bytes(n) for n in range(_ALIGNMENT)]


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a message says of itself. An array on the wire; older peers ignore entries added at its end."""

    kind: Name
    """The record's tag, see `wire_tag`."""
    body: msgspec.Raw
    """The record's fields."""
    tensors: Annotated[tuple[TensorHeader, ...], msgspec.Meta(max_length=1024)] = ()
    method: Name = ""
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
_tags: dict[type, str] = {}
_record_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def wire_tag(tag: str) -> Callable[[type[Record]], type[Record]]:
    """Class decorator: on the wire the record is called ``tag``, whatever its class comes to be called."""

    def name(record_type: type[Record]) -> type[Record]:
        _tags[record_type] = tag
        return record_type

    return name


def tag_of(record_type: type) -> str:
    """What the record is called on the wire: its `wire_tag`, or else the name of its class."""
    return _tags.get(record_type, record_type.__name__)


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
    """The buffers of one message, its kind the record's tag; tensor data is passed on, not copied.

    ``method`` and ``timeout`` belong to the first message of a stream, see `Header`. Raise
    `MessageTooLargeError` when the message is above ``limits.max_message``.
    """
    kind = tag_of(type(record))
    body = msgspec.Raw(_encoder.encode(record))
    header = Header(kind, body, tuple(map(Tensor.header, tensors)), method, timeout)
    encoded = _encoder.encode(header)
    buffers: list[Buffer] = [_LENGTH.pack(len(encoded)) + encoded]
    total = _LENGTH.size + len(encoded)
    for tensor in tensors:
        # Padding puts tensors on aligned offsets, so that they can be used where they were received.
        if padding := -total % _ALIGNMENT:
            buffers.append(_PADDING[padding])
        buffers.append(tensor.data if tensor.data.format == "B" else tensor.data.cast("B"))
        total += padding + tensor.data.nbytes
    if total > limits.max_message or len(encoded) > limits.max_header:
        raise MessageTooLargeError(
            f"message {kind!r} takes {total} bytes (header {len(encoded)}), above the limit of "
            f"{limits.max_message} (header {limits.max_header}); send it in smaller pieces"
        )
    return buffers


def kinds_of(*record_types: type) -> dict[str, type]:
    """Records by the name they have on the wire."""
    return {tag_of(record_type): record_type for record_type in record_types}


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
        raise ProtocolError(f"message {header.kind!r} has no place here; expected {' or '.join(kinds)}")
    record = decode_record(header.body, record_type)
    check_headers(header.tensors, limits)
    tensors = []
    for tensor in header.tensors:
        start = end + -end % _ALIGNMENT
        end = start + tensor.nbytes
        if end > data.nbytes:
            raise ProtocolError(f"tensor {tensor.name!r} reaches past the end of the message")
        tensors.append(Tensor(tensor.name, tensor.dtype, tensor.shape, data[start:end], tensor.codec))
    if end != data.nbytes:
        raise ProtocolError(f"{data.nbytes - end} bytes are left over after the message")
    return Message(header.kind, record, tuple(tensors))


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

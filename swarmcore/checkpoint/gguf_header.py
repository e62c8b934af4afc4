"""The header of a GGUF file, which nobody has vouched for: its metadata, and where each tensor lies.

Everything is checked against the file's size before memory is taken for it, and against the layout that ggml
itself asks for: tensors follow each other without gaps, in the order in which they are listed. So a type or a
shape that is not that of the bytes shows, as it moves all tensors after it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from swarmcore.checkpoint.location import LFS_POINTER, lfs_pointer
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.printable import printable_line

MAGIC = b"GGUF"
MAX_HEADER = 512 * 1024 * 1024
"""Bytes of a header; that of a vocabulary of 250,000 tokens takes some 15 MB."""
DEFAULT_ALIGNMENT = 32

_MAX_NAME = 63
_MAX_KEY = 65535
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_FIRST_READ = 256 * 1024

_LENGTH = struct.Struct("<Q")

SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
"""Formats of the kinds of plain values, as `struct` has them."""
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


@attrs.frozen
class TensorType:
    """One of ggml's types: ``block`` values take ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


TENSOR_TYPES = {
    number: TensorType(*described)
    for number, described in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
        28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
        42: ("Q2_0", 64, 18),
    }.items()
}  # fmt: skip
"""By the number that stands for them in files."""


@attrs.frozen
class Value:
    """A value of the metadata, as it is in the file: ``raw`` without its kind, and of an array its count."""

    kind: int
    raw: bytes = attrs.field(repr=False)
    item: int | None = None
    """Kind of an array's items; None for what is no array."""
    count: int = 1

    @classmethod
    def of(cls, kind: int, content: Any) -> Value:
        """``content`` as the kind; a list or tuple becomes an array."""
        if isinstance(content, list | tuple):
            packed = struct.pack(f"<{len(content)}{SCALARS[kind]}", *content)
            return cls(ARRAY, packed, kind, len(content))
        if kind == STRING:
            text = str(content).encode()
            return cls(kind, struct.pack("<Q", len(text)) + text)
        return cls(kind, struct.pack(f"<{SCALARS[kind]}", content))

    def decode(self) -> Any:
        """As Python has it; raise `ValueError` for text that is not UTF-8."""
        if self.item is None:
            if self.kind == STRING:
                return self.raw[8:].decode()
            return struct.unpack(f"<{SCALARS[self.kind]}", self.raw)[0]
        if self.item == STRING:
            return list(self._strings())
        return list(struct.unpack(f"<{self.count}{SCALARS[self.item]}", self.raw))

    def encode(self) -> bytes:
        """As it stands after its key in a file."""
        if self.item is None:
            return struct.pack("<I", self.kind) + self.raw
        return struct.pack("<IIQ", self.kind, self.item, self.count) + self.raw

    def _strings(self) -> Iterator[str]:
        at = 0
        for _ in range(self.count):
            length = int.from_bytes(self.raw[at : at + 8], "little")
            yield self.raw[at + 8 : at + 8 + length].decode()
            at += 8 + length


@attrs.frozen
class Tensor:
    """A tensor in a file: bytes ``start`` to ``end``. ``shape`` is in ggml's order, the rows' width first."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@attrs.frozen
class Header:
    """What a file says of itself, without the values of its weights."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]


def tensor_bytes(type_number: int, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes. Its width is a multiple of the type's block."""
    kind = TENSOR_TYPES[type_number]
    return math.prod(shape) // kind.block * kind.nbytes


def padded(size: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """The next multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def read_header(read: Callable[[int, int], bytes], size: int, label: str) -> Header:
    """The header of a file of ``size`` bytes, of which ``read(start, end)`` gives bytes.

    ``label`` is what errors call the file. Raise `CheckpointError` for a file that is truncated or damaged,
    `UnsupportedModelError` for a version or type of tensors that is not known.
    """
    cursor = _Cursor(read, size, label)
    _check_start(cursor.take(8) if size >= 8 else read(0, size), label)
    tensors, keys = cursor.unpack("<QQ")
    cursor.check_count(tensors, 24, "tensors")
    cursor.check_count(keys, 13, "keys")
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = cursor.text(_MAX_KEY, "a key")
        if not key or key in metadata:
            raise cursor.damaged(f"the key {key!r} is there twice" if key else "it has a key without a name")
        metadata[key] = _read_value(cursor, key)
    alignment = _alignment(metadata.get("general.alignment"), cursor)
    listed = [_read_tensor(cursor) for _ in range(tensors)]
    return Header(metadata, _placed(listed, padded(cursor.at, alignment), alignment, cursor))


class _Cursor:
    """Reads a file from its start on, a growing piece at a time, and never past its end."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, label: str) -> None:
        self.size, self.label, self.at = size, label, 0
        self._read, self._buffer = read, bytearray()

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.label} ({self.size} bytes) is truncated or damaged: {why}; download or copy it again",
            actual=self.size,
        )

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        start, end = self.at, self.at + count
        self._need(end)
        self.at = end
        return bytes(self._buffer[start:end])

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, limit: int, what: str) -> str:
        (length,) = self.unpack("<Q")
        if length > limit:
            raise self.damaged(f"{what} has {length} characters, more than {limit}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as exc:
            raise self.damaged(f"{what} is not text") from exc

    def strings(self, count: int) -> bytes:
        """So many strings, with their lengths, as they are in the file."""
        start = at = self.at
        held, length_at = len(self._buffer), _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > held:
                self._need(at + 8)
                held = len(self._buffer)
            at += 8 + length_at(self._buffer, at)[0]
        self._need(at)
        self.at = at
        return bytes(self._buffer[start:at])

    def check_count(self, count: int, least: int, what: str) -> None:
        """Raise `CheckpointError` where so many things of ``least`` bytes cannot be in what is left."""
        if count * least > min(self.size, MAX_HEADER) - self.at:
            raise self.damaged(
                f"it says that it has {count} {what}, more than its {self.size} bytes can hold"
            )

    def _need(self, end: int) -> None:
        if end <= len(self._buffer):
            return
        if end > self.size:
            raise self._cut(end)
        if end > MAX_HEADER:
            raise self.damaged(f"its header takes more than {MAX_HEADER} bytes")
        upto = min(self.size, max(end, 2 * len(self._buffer), _FIRST_READ))
        more = self._read(len(self._buffer), upto)
        if len(more) != upto - len(self._buffer):
            raise self._cut(upto)
        self._buffer += more

    def _cut(self, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self.label} is truncated: it has {self.size} bytes, its header goes on to byte {end} at "
            f"least; download or copy it again",
            actual=self.size,
            expected=end,
        )


def _check_start(start: bytes, label: str) -> None:
    if start[:4] == LFS_POINTER[:4]:
        raise lfs_pointer(label)
    if start[:4] != MAGIC:
        raise CheckpointError(f"{label} is not a GGUF file: it begins with {start[:4]!r}")
    if len(start) < 8:
        raise CheckpointError(f"{label} is truncated: it has {len(start)} bytes")
    version = int.from_bytes(start[4:], "little")
    if version in (2, 3):
        return
    if version and not version & 0xFFFF:
        raise UnsupportedModelError(f"{label} is a GGUF for big-endian machines; take one that is not")
    raise UnsupportedModelError(f"{label} is of version {version} of GGUF, and 2 and 3 can be read")


def _read_value(cursor: _Cursor, key: str) -> Value:
    (kind,) = cursor.unpack("<I")
    if kind == STRING:
        return Value(kind, cursor.strings(1))
    if kind in SCALARS:
        return Value(kind, cursor.take(struct.calcsize(f"<{SCALARS[kind]}")))
    if kind != ARRAY:
        raise cursor.damaged(f"{printable_line(key)} is of the kind {kind}, which GGUF does not have")
    item, count = cursor.unpack("<IQ")
    if item != STRING and item not in SCALARS:
        raise cursor.damaged(
            f"{printable_line(key)} is an array of the kind {item}, which GGUF does not have"
        )
    width = 8 if item == STRING else struct.calcsize(f"<{SCALARS[item]}")
    cursor.check_count(count, width, f"items in {printable_line(key)}")
    raw = cursor.strings(count) if item == STRING else cursor.take(count * width)
    return Value(kind, raw, item, count)


def _alignment(value: Value | None, cursor: _Cursor) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    found = value.decode() if value.kind == UINT32 else None
    if not found or found & (found - 1) or found > _MAX_ALIGNMENT:
        raise cursor.damaged(f"general.alignment is {found}, not a power of two")
    return int(found)


def _read_tensor(cursor: _Cursor) -> Tensor:
    """A tensor as it is listed: its bytes are counted from where the tensors begin."""
    name = cursor.text(_MAX_NAME, "the name of a tensor")
    shown = f"tensor {printable_line(name)}"
    (dimensions,) = cursor.unpack("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"{shown} has {dimensions} dimensions")
    shape = cursor.unpack(f"<{dimensions}Q")
    number, offset = cursor.unpack("<IQ")
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        raise UnsupportedModelError(
            f"{cursor.label}: {shown} is of the type {number}, which is not known here or was given up; take "
            f"a file in another quantisation"
        )
    if shape[0] % kind.block:
        raise cursor.damaged(
            f"{shown} is {shape[0]} values wide and of the type {kind.name}, which comes in {kind.block}"
        )
    size = tensor_bytes(number, shape)
    if not 0 < size <= cursor.size:
        raise cursor.damaged(f"{shown} of shape {list(shape)} takes {size} bytes, the file {cursor.size}")
    return Tensor(name, number, shape, offset, offset + size)


def _placed(listed: list[Tensor], base: int, alignment: int, cursor: _Cursor) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    expected = 0
    for tensor in listed:
        shown = f"tensor {printable_line(tensor.name)}"
        if tensor.name in tensors:
            raise cursor.damaged(f"{shown} is there twice")
        if tensor.start != expected:
            raise cursor.damaged(
                f"{shown} begins at {tensor.start}; by types and shapes of those before it, it has to begin "
                f"at {expected}"
            )
        expected = padded(tensor.end, alignment)
        tensors[tensor.name] = attrs.evolve(tensor, start=base + tensor.start, end=base + tensor.end)
    last = max((tensor.end for tensor in tensors.values()), default=base)
    if last > cursor.size:
        raise CheckpointError(
            f"{cursor.label} is truncated: it has {cursor.size} bytes, and {last} belong to it; download or "
            f"copy it again",
            actual=cursor.size,
            expected=last,
        )
    return tensors

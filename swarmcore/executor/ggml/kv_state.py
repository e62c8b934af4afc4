"""llama.cpp's serialised attention caches, read and written: for transfers, span changes and repairs.

The format is that of ``llama_state_get_data`` and ``llama_state_seq_get_data`` for a cache of one stream and
one kind of attention. Other caches (sliding windows beside full attention) are found out by `read_layout`.
"""

from __future__ import annotations

import struct
from typing import Any

import attrs
import numpy as np

from swarmcore.errors import InternalError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

F32, F16, Q8_0 = 0, 1, 8
"""What keys and values may be kept in, as ggml numbers it."""
_DTYPES = {F32: "float32", F16: "float16", Q8_0: "uint8"}
"""As what they travel."""
_UNITS = {F32: 4, F16: 2, Q8_0: 34}
"""Bytes of what is kept together: a value; of Q8_0 a scale in float16, and 32 values."""
_SCALE = 2
_MAX_ARCHITECTURE = 256
_SEQUENCE_HEAD = 8
"""A magic number, and which sequence it was."""


@attrs.frozen
class Width:
    """What the cache of one layer keeps for each token: ``nbytes`` of ggml's type ``kind``."""

    kind: int
    nbytes: int


@attrs.frozen
class CacheLayout:
    """How a context's cache is laid out."""

    transposed: bool
    """Whether values are kept with the tokens as the inner dimension."""
    keys: tuple[Width, ...]
    """Of each layer."""
    values: tuple[Width, ...]
    head: bytes = attrs.field(eq=False)
    """What stands before the state of a sequence."""

    @property
    def dtype(self) -> str:
        """Of wire tensors with keys or values."""
        return _DTYPES[self.keys[0].kind]

    def part(self, first: int, last: int) -> CacheLayout:
        return attrs.evolve(self, keys=self.keys[first:last], values=self.values[first:last])


@attrs.define
class CacheState:
    """Cached tokens, in no order. Arrays of a layer are ``[tokens, bytes]``."""

    positions: np.ndarray[Any, np.dtype[np.int32]]
    owners: list[tuple[int, ...]]
    """The sequences of the context that each token belongs to."""
    keys: list[Bytes]
    values: list[Bytes]
    head: bytes
    """What stands before it."""

    def sound(self, layout: CacheLayout) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each token, whether all that is kept of it is finite."""
        found = np.ones(len(self.positions), np.bool_)
        for widths, arrays in ((layout.keys, self.keys), (layout.values, self.values)):
            for width, array in zip(widths, arrays, strict=True):
                if width.kind == Q8_0:
                    units = array.reshape(len(array), -1, _UNITS[Q8_0])[:, :, :_SCALE]
                    values = np.ascontiguousarray(units).view(np.float16).reshape(len(array), -1)
                else:
                    values = array.view(_DTYPES[width.kind])
                found &= np.isfinite(values).all(1)
        return found

    def write(self, layout: CacheLayout) -> bytes:
        """As llama.cpp reads it."""
        parts: list[bytes] = [self.head, struct.pack("<II", 1, len(self.positions))]
        if len(self.positions):
            for position, owners in zip(self.positions.tolist(), self.owners, strict=True):
                parts.append(struct.pack(f"<iI{len(owners)}i", position, len(owners), *owners))
            parts.append(struct.pack("<II", layout.transposed, len(layout.keys)))
            for width, array in zip(layout.keys, self.keys, strict=True):
                parts += [struct.pack("<iQ", width.kind, width.nbytes), array.tobytes()]
            for width, array in zip(layout.values, self.values, strict=True):
                if layout.transposed:
                    item = _UNITS[width.kind]
                    many = width.nbytes // item
                    by_value = array.reshape(len(array), many, item).transpose(1, 0, 2)
                    parts += [struct.pack("<iII", width.kind, item, many), by_value.tobytes()]
                else:
                    parts += [struct.pack("<iQ", width.kind, width.nbytes), array.tobytes()]
        return b"".join(parts)


def read_layout(state: memoryview) -> CacheLayout | None:
    """The layout of the cache that the state of one sequence with tokens is of.

    None for a cache of another format: it can be used, and not be looked into.
    """
    try:
        return _read(state, whole=False)[1]
    except (struct.error, ValueError, KeyError, IndexError):
        return None


def read_state(state: memoryview, layout: CacheLayout, *, whole: bool) -> CacheState:
    """What llama.cpp wrote: ``whole`` is of a context, else of one sequence.

    Raise `InternalError` when that is not of the layout.
    """
    try:
        found, seen = _read(state, whole=whole)
    except (struct.error, ValueError, KeyError, IndexError) as exc:
        raise InternalError(f"the state of llama.cpp's cache cannot be read: {exc}") from exc
    if len(found.positions) and seen != layout:
        raise InternalError(f"the state of llama.cpp's cache is laid out as {seen}, expected {layout}")
    return found


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def raw(self, nbytes: int) -> memoryview:
        if not 0 <= nbytes <= len(self._data) - self._at:
            raise ValueError("it ends too early")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    def seen(self) -> bytes:
        return bytes(self._data[: self._at])

    @property
    def done(self) -> bool:
        return self._at == len(self._data)


def _read(state: memoryview, *, whole: bool) -> tuple[CacheState, CacheLayout]:
    reader = _Reader(state)
    if whole:
        (length,) = reader.take("<I")
        if length > _MAX_ARCHITECTURE:
            raise ValueError("it does not begin with an architecture")
        reader.raw(length)
    else:
        reader.raw(_SEQUENCE_HEAD)
    head = reader.seen()
    streams, tokens = reader.take("<II")
    if streams != 1:
        raise ValueError(f"a cache of {streams} streams")
    positions, owners = np.zeros(tokens, np.int32), []
    for at in range(tokens):
        positions[at], many = reader.take("<iI")
        if many < 1 or (many != 1 and not whole):
            raise ValueError("a token of no sequence")
        owners.append(reader.take(f"<{many}i"))
    keys: list[Bytes] = []
    values: list[Bytes] = []
    layout_keys: list[Width] = []
    layout_values: list[Width] = []
    transposed = 0
    if tokens:
        transposed, layers = reader.take("<II")
        if transposed > 1:
            raise ValueError("neither transposed nor not")
        for _ in range(layers):
            keys.append(_rows(reader, tokens, layout_keys))
        for _ in range(layers):
            values.append((_columns if transposed else _rows)(reader, tokens, layout_values))
    if not reader.done:
        raise ValueError("more follows")
    layout = CacheLayout(bool(transposed), tuple(layout_keys), tuple(layout_values), head)
    return CacheState(positions, owners, keys, values, head), layout


def _rows(reader: _Reader, tokens: int, widths: list[Width]) -> Bytes:
    kind, nbytes = reader.take("<iQ")
    widths.append(Width(kind, nbytes))
    if nbytes % _UNITS[kind]:
        raise ValueError("a row of half a value")
    return np.frombuffer(reader.raw(tokens * nbytes), np.uint8).reshape(tokens, nbytes)


def _columns(reader: _Reader, tokens: int, widths: list[Width]) -> Bytes:
    kind, item, many = reader.take("<iII")
    if item != _UNITS[kind]:
        raise ValueError(f"values of {item} bytes")
    widths.append(Width(kind, item * many))
    by_value = np.frombuffer(reader.raw(tokens * item * many), np.uint8).reshape(many, tokens, item)
    return np.ascontiguousarray(by_value.transpose(1, 0, 2)).reshape(tokens, many * item)

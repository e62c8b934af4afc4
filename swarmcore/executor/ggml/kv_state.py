"""llama.cpp's serialised attention caches, read and written: for transfers, span changes and repairs.

The format is that of ``llama_state_get_data`` and ``llama_state_seq_get_data`` for caches of one stream. A
model with sliding windows has two, one behind the other: of the layers that attend to everything, and of the
others. What is neither is found out by `read_layout`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from swarmcore.errors import InternalError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Positions = np.ndarray[Any, np.dtype[np.int32]]

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
    caches: tuple[tuple[int, ...], ...]
    """The layers that are kept together, in the order in which they are written."""
    head: bytes = attrs.field(eq=False)
    """What stands before the state of a sequence."""

    @property
    def dtype(self) -> str:
        """Of wire tensors with keys or values."""
        return _DTYPES[self.keys[0].kind]


@attrs.define
class CacheState:
    """Cached tokens, in no order. Arrays of a layer are ``[tokens, bytes]``."""

    positions: Positions
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
        tokens = [struct.pack("<II", 1, len(self.positions))]
        for position, owners in zip(self.positions.tolist(), self.owners, strict=True):
            tokens.append(struct.pack(f"<iI{len(owners)}i", position, len(owners), *owners))
        parts: list[bytes] = [self.head]
        for layers in layout.caches:
            parts += tokens
            if len(self.positions):
                parts += self._data(layout, layers)
        return b"".join(parts)

    def _data(self, layout: CacheLayout, layers: tuple[int, ...]) -> list[bytes]:
        parts = [struct.pack("<II", layout.transposed, len(layers))]
        for layer in layers:
            width = layout.keys[layer]
            parts += [struct.pack("<iQ", width.kind, width.nbytes), self.keys[layer].tobytes()]
        for layer in layers:
            width, array = layout.values[layer], self.values[layer]
            if layout.transposed:
                item = _UNITS[width.kind]
                many = width.nbytes // item
                by_value = array.reshape(len(array), many, item).transpose(1, 0, 2)
                parts += [struct.pack("<iII", width.kind, item, many), by_value.tobytes()]
            else:
                parts += [struct.pack("<iQ", width.kind, width.nbytes), array.tobytes()]
        return parts


def caches_of(layers: int, sliding: Sequence[bool] | None) -> tuple[tuple[int, ...], ...]:
    """Which layers' keys and values llama.cpp keeps together; ``sliding`` says whose windows slide."""
    if sliding is None:
        return (tuple(range(layers)),)
    return tuple(
        tuple(layer for layer, slides in enumerate(sliding) if slides == kind) for kind in (False, True)
    )


def read_layout(state: memoryview, caches: tuple[tuple[int, ...], ...]) -> CacheLayout | None:
    """The layout of the ``caches`` that the state of one sequence with tokens is of.

    None for caches of another format: they can be used, and not be looked into.
    """
    try:
        return _read(state, caches, whole=False)[1]
    except (struct.error, ValueError, KeyError, IndexError):
        return None


def read_state(state: memoryview, layout: CacheLayout, *, whole: bool) -> CacheState:
    """What llama.cpp wrote: ``whole`` is of a context, else of one sequence.

    Raise `InternalError` when that is not of the layout.
    """
    try:
        found, seen = _read(state, layout.caches, whole=whole)
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


def _read(
    state: memoryview, caches: tuple[tuple[int, ...], ...], *, whole: bool
) -> tuple[CacheState, CacheLayout]:
    reader = _Reader(state)
    if whole:
        (length,) = reader.take("<I")
        if length > _MAX_ARCHITECTURE:
            raise ValueError("it does not begin with an architecture")
        reader.raw(length)
    else:
        reader.raw(_SEQUENCE_HEAD)
    head = reader.seen()
    parts = [_Cache.read(reader, len(layers), whole=whole) for layers in caches]
    if not reader.done:
        raise ValueError("more follows")
    if len({part.transposed for part in parts}) > 1:
        raise ValueError("one cache is transposed, and another is not")
    first, *others = parts
    for part in others:
        part.arrange_as(first)
    # Layer by layer, whichever cache it is in.
    by_layer = sorted(
        (layer, part, index)
        for part, layers in enumerate(caches)
        for index, layer in enumerate(layers)
        if len(first.positions)
    )
    keys = [parts[part].keys[index] for _, part, index in by_layer]
    values = [parts[part].values[index] for _, part, index in by_layer]
    layout = CacheLayout(
        first.transposed,
        tuple(width for width, _ in keys),
        tuple(width for width, _ in values),
        caches,
        head,
    )
    arrays = [array for _, array in keys], [array for _, array in values]
    return CacheState(first.positions, first.owners, *arrays, head), layout


_Layer = tuple[Width, Bytes]


@attrs.define
class _Cache:
    """One of the caches in a state; keys and values of its layers alone."""

    transposed: bool
    positions: Positions
    owners: list[tuple[int, ...]]
    keys: list[_Layer]
    values: list[_Layer]

    @classmethod
    def read(cls, reader: _Reader, layers: int, *, whole: bool) -> _Cache:
        streams, tokens = reader.take("<II")
        if streams != 1:
            raise ValueError(f"a cache of {streams} streams")
        positions, owners = np.zeros(tokens, np.int32), []
        for at in range(tokens):
            positions[at], many = reader.take("<iI")
            if many < 1 or (many != 1 and not whole):
                raise ValueError("a token of no sequence")
            owners.append(reader.take(f"<{many}i"))
        if not tokens:
            return cls(False, positions, owners, [], [])
        transposed, found = reader.take("<II")
        if transposed > 1:
            raise ValueError("neither transposed nor not")
        if found != layers:
            raise ValueError(f"a cache of {found} layers")
        keys = [_rows(reader, tokens) for _ in range(layers)]
        values = [(_columns if transposed else _rows)(reader, tokens) for _ in range(layers)]
        return cls(bool(transposed), positions, owners, keys, values)

    def arrange_as(self, other: _Cache) -> None:
        """Have the tokens in the order of another cache. Raise `ValueError` unless they are the same."""
        where = {each: at for at, each in enumerate(zip(self.positions.tolist(), self.owners, strict=True))}
        wanted = list(zip(other.positions.tolist(), other.owners, strict=True))
        if len(where) != len(self.positions) or where.keys() != set(wanted):
            raise ValueError("tokens of one cache are not in the other")
        order = [where[each] for each in wanted]
        self.positions, self.owners = other.positions, other.owners
        self.keys = [(width, array[order]) for width, array in self.keys]
        self.values = [(width, array[order]) for width, array in self.values]


def _rows(reader: _Reader, tokens: int) -> _Layer:
    kind, nbytes = reader.take("<iQ")
    if nbytes % _UNITS[kind]:
        raise ValueError("a row of half a value")
    return Width(kind, nbytes), np.frombuffer(reader.raw(tokens * nbytes), np.uint8).reshape(tokens, nbytes)


def _columns(reader: _Reader, tokens: int) -> _Layer:
    kind, item, many = reader.take("<iII")
    if item != _UNITS[kind]:
        raise ValueError(f"values of {item} bytes")
    by_value = np.frombuffer(reader.raw(tokens * item * many), np.uint8).reshape(many, tokens, item)
    array = np.ascontiguousarray(by_value.transpose(1, 0, 2)).reshape(tokens, many * item)
    return Width(kind, item * many), array

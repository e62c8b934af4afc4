"""Random records of any type, from its fields: often plausible, sometimes absurd."""

from __future__ import annotations

import math
import types
import typing
from random import Random
from typing import Any

import attrs

from swarmcore.types import PeerId

_INTS = (0, 1, 2, 3, 5, -1, 2**31 - 1, 2**32, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 0.5, 1.0, 5.0, -1.0, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "raw", "int8", "raw+zstd", "all", "none", "off", "servers", "../../x", "\x1b[2J", "ü" * 50)


class RecordMaker:
    """Makes records of attrs classes. ``plausible`` holds values to choose from, by the name of a field."""

    def __init__(self, rng: Random, plausible: dict[str, tuple[Any, ...]], peers: tuple[PeerId, ...]) -> None:
        self._rng = rng
        self._plausible = plausible
        self._peers = peers

    def make(self, record_type: type, depth: int = 0) -> Any:
        """A record of ``record_type``."""
        hints = typing.get_type_hints(record_type)
        fields = attrs.fields(record_type)
        return record_type(**{field.name: self._field(field, hints, depth) for field in fields})

    def _field(self, field: Any, hints: dict[str, Any], depth: int) -> Any:
        roll = self._rng.random()
        if roll < 0.7 and field.name in self._plausible:
            return self._rng.choice(self._plausible[field.name])
        if roll < 0.5 and field.default is not attrs.NOTHING and not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
            return field.default
        return self._value(hints[field.name], depth)

    def _value(self, hint: Any, depth: int) -> Any:
        rng, origin = self._rng, typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            return self._value(rng.choice(typing.get_args(hint)), depth)
        if origin is tuple:
            of = typing.get_args(hint)[0]
            longest = 4 if depth < 3 else 0
            count = rng.randrange(longest + 1) if rng.random() < 0.95 else 30 * longest
            return tuple(self._value(of, depth + 1) for _ in range(count))
        if origin is dict:
            return {}
        if origin is typing.Literal:
            return rng.choice(typing.get_args(hint))
        if attrs.has(hint):
            return self.make(hint, depth + 1)
        if hint is bool:
            return rng.random() < 0.5
        if hint is int:
            return rng.choice(_INTS)
        if hint is float:
            return rng.choice(_FLOATS)
        if hint is bytes:
            return rng.randbytes(rng.choice((0, 8, 16, 64, 2048)))
        if hint is PeerId:
            return rng.choice(self._peers)
        if hint is str:
            return rng.choice(_TEXTS)
        return None


# What msgpack, our frames and our headers read as "so much follows".
_LENGTHS = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9", b"\xdc", b"\xde")
_SIZES = (0, 1, 2**20, 2**26, 2**26 + 1, 2**31, 2**32 - 1)


def mutate(data: bytes, rng: Random) -> bytes:
    """``data`` with a few changes, most of them near its beginning, where the lengths are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(min(len(changed), 400) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 1] = rng.choice(_LENGTHS)
            case 2:
                del changed[at : at + rng.randrange(1, 20)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                changed[at : at + 4] = rng.choice(_SIZES).to_bytes(4, "little")
            case 5:
                changed[at:at] = rng.choice((b"\x91", b"\x81\xa0", b"\xc0")) * rng.randrange(1, 3000)
            case _:
                changed[at:at] = changed[max(0, at - 40) : at]
    return bytes(changed)

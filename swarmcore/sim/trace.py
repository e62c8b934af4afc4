"""What happened in a simulation, as one hash: equal hashes mean equal runs, message for message."""

from __future__ import annotations

import struct
from hashlib import blake2b

_MESSAGE = struct.Struct("<dII")


class Trace:
    """Takes in every message that arrives, whole, and every note that a scenario makes of an event."""

    def __init__(self) -> None:
        self.messages = 0
        self.notes = 0
        self._sealed = False
        self._hash = blake2b(digest_size=16)

    def message(self, now: float, source: int, target: int, data: bytes | bytearray) -> None:
        """Host number ``source`` sent ``data``, and all of it is at host ``target`` now."""
        if self._sealed:
            return
        self.messages += 1
        self._hash.update(_MESSAGE.pack(now, source, target))
        self._hash.update(data)

    def note(self, now: float, text: str) -> None:
        """Something else happened: a crash, a generation that ended."""
        if self._sealed:
            return
        self.notes += 1
        self._hash.update(f"{now!r} {text}\n".encode())

    def seal(self) -> None:
        """Take in nothing more: the simulation is over, and is only being cleared away."""
        self._sealed = True

    @property
    def hash(self) -> str:
        """Of all so far, 32 hex digits."""
        return self._hash.hexdigest()

    def __repr__(self) -> str:
        return f"<Trace {self.hash} of {self.messages} messages and {self.notes} notes>"

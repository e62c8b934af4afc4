"""What each side of a connection asks of the other, told before the first stream."""

from __future__ import annotations

import struct

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.flow import FIRST_WINDOW, MIN_WINDOW, window_for

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

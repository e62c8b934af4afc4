"""What a message weighs on a simulated wire.

Hidden states of a simulated model are tiny. On the wire they count as many bytes as those of the model that
they stand for; everything else counts as it is.
"""

from __future__ import annotations

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.wire.framing import decode_header
from swarmcore.wire.limits import Limits

_LIMITS = Limits()
_FRAMING = 80
"""Bytes that TCP, TLS and IP put around a small message."""


@attrs.frozen
class Scale:
    """How many bytes one simulated byte stands for."""

    hidden: float = 1.0
    """In hidden states."""
    cache: float = 1.0
    """In attention caches that are handed over."""

    def weigh(self, message: bytearray) -> tuple[float, str]:
        """Bytes that ``message`` takes on the wire, and the method that it opens a stream for, if any."""
        size = float(len(message) + _FRAMING)
        try:
            header = decode_header(memoryview(message), _LIMITS)
        except ProtocolError:
            return size, ""
        for tensor in header.tensors:
            size += tensor.nbytes * ((self.hidden if tensor.name == "hidden" else self.cache) - 1)
        return size, header.method

"""How a pipe hands what has come to its protocol, which reads into buffers of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def hand_over(data: bytes, taker: Callable[[], asyncio.BufferedProtocol | None]) -> bytes:
    """Give ``data`` to the protocol that ``taker`` names before each piece, or return what it does not take.

    A protocol may pause reading, hand the pipe on or close it in the midst of this; ``taker`` then names
    another one, or None.
    """
    rest = memoryview(data)
    while rest and (protocol := taker()) is not None:
        # Let go of before the next is asked for: a buffer that is looked at cannot grow.
        with memoryview(protocol.get_buffer(len(rest))) as buffer:
            taken = min(len(buffer), len(rest))
            buffer[:taken] = rest[:taken]
        rest = rest[taken:]
        protocol.buffer_updated(taken)
    return bytes(rest)

"""Datagrams read many at a time: asyncio reads one, then looks at everything else that may have happened."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from swarmcore_transports.webrtc.borrowed_socket import borrowed, datagram_socket

_MOST_AT_ONCE = 32
_LARGEST = 65536

Received = Callable[[bytes, tuple[Any, ...]], None]


def read_in_batches(protocol: asyncio.DatagramProtocol, transport: asyncio.BaseTransport) -> None:
    """From now on ``protocol`` gets with each datagram of ``transport`` those that have come behind it.

    A transport without a socket of its own, such as one through a TURN server, is left as it is.
    """
    own = datagram_socket(transport)
    if own is None:
        return
    take: Received = protocol.datagram_received

    def received(data: bytes, sender: tuple[Any, ...]) -> None:
        take(data, sender)
        reader = borrowed(own)
        try:
            for _ in range(_MOST_AT_ONCE - 1):
                if transport.is_closing():
                    return
                take(*reader.recvfrom(_LARGEST, socket.MSG_DONTWAIT))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            protocol.error_received(exc)
        finally:
            reader.detach()

    protocol.datagram_received = received  # type: ignore[method-assign, assignment]

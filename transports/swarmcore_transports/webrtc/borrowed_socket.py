"""The socket of an asyncio transport, with all its methods: what the transport shows of it lacks some."""

from __future__ import annotations

import asyncio
import socket
from typing import Any


def datagram_socket(transport: asyncio.BaseTransport) -> Any:
    """What ``transport`` shows of its own UDP socket; None where it has none, as through a TURN server."""
    own = transport.get_extra_info("socket")
    return own if own is not None and own.type == socket.SOCK_DGRAM else None


def borrowed(own: Any) -> socket.socket:
    """A socket of the same file descriptor. To be detached, never closed: it belongs to the transport."""
    return socket.socket(own.family, own.type, own.proto, fileno=own.fileno())

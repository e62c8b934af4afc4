"""Datagrams that came to a closed port, as Linux tells of them: a peer that was killed, most likely."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable
from typing import Any

from swarmcore_transports.webrtc.borrowed_socket import borrowed, datagram_socket

# From linux/in.h and linux/in6.h; `socket` names them in newer versions of Python only.
_TELL = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}
_MSG_ERRQUEUE = 0x2000
_MOST_AT_ONCE = 64


def watch_refusals(
    protocol: asyncio.DatagramProtocol,
    transport: asyncio.BaseTransport,
    on_refused: Callable[[str, int], None],
) -> None:
    """Have ``on_refused`` told host and port whenever a datagram of ``transport`` found nobody there.

    An ICMP message says so, which anybody can forge: take it for a hint. Nothing is told on other systems
    than Linux, nor of a transport without a socket of its own, such as one through a TURN server.
    """
    own = datagram_socket(transport)
    if sys.platform != "linux" or own is None or own.family not in _TELL:
        return
    report = protocol.error_received

    def error_received(exc: Exception) -> None:
        # The queue has to be emptied whatever the error: until then the socket counts as readable.
        for host, port in _refused(own):
            on_refused(host, port)
        report(exc)

    protocol.error_received = error_received  # type: ignore[method-assign]
    same = borrowed(own)
    try:
        same.setsockopt(*_TELL[own.family], 1)
    finally:
        same.detach()


def _refused(own: Any) -> list[tuple[str, int]]:
    found = []
    same = borrowed(own)
    try:
        for _ in range(_MOST_AT_ONCE):
            _, notes, _, address = same.recvmsg(0, 512, _MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            errors = [int.from_bytes(note[:4], sys.byteorder) for _, _, note in notes]
            if errno.ECONNREFUSED in errors:
                found.append((str(address[0]), int(address[1])))
    except OSError:  # it is empty, or the socket is closed
        pass
    finally:
        same.detach()
    return found

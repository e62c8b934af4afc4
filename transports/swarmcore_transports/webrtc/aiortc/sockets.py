"""What asyncio does not do with UDP sockets: read many datagrams at a time, and say which were refused."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable
from typing import Any


def datagram_socket(transport: asyncio.BaseTransport) -> Any:
    """What ``transport`` shows of its own UDP socket; None where it has none, as through a TURN server."""
    own = transport.get_extra_info("socket")
    return own if own is not None and own.type == socket.SOCK_DGRAM else None


def borrowed(own: Any) -> socket.socket:
    """A socket of the same file descriptor. To be detached, never closed: it belongs to the transport."""
    return socket.socket(own.family, own.type, own.proto, fileno=own.fileno())


_MAX_READS = 32
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
            for _ in range(_MAX_READS - 1):
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


# From linux/in.h and linux/in6.h; `socket` names them in newer versions of Python only.
_RECEIVE_ERRORS = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}
_MSG_ERRQUEUE = 0x2000
_MAX_ERRORS = 64


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
    if sys.platform != "linux" or own is None or own.family not in _RECEIVE_ERRORS:
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
        same.setsockopt(*_RECEIVE_ERRORS[own.family], 1)
    finally:
        same.detach()


def _refused(own: Any) -> list[tuple[str, int]]:
    found = []
    same = borrowed(own)
    try:
        for _ in range(_MAX_ERRORS):
            _, notes, _, address = same.recvmsg(0, 512, _MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            errors = [int.from_bytes(note[:4], sys.byteorder) for _, _, note in notes]
            if errno.ECONNREFUSED in errors:
                found.append((str(address[0]), int(address[1])))
    except OSError:  # it is empty, or the socket is closed
        pass
    finally:
        same.detach()
    return found

"""Listening on TCP: endpoints, and sockets that are counted from their acceptance on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from swarmcore.errors import AddressError, AddressInUseError, ResourceLimitError
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager

logger = logging.getLogger(__name__)

_BACKLOG = 512
_MAX_AT_ONCE = 64  # accepted before other callbacks get their turn
_PAUSE = 1.0

_ENDPOINT = re.compile(r"(?:\[(?P<v6>[^\[\]/]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})")


@attrs.frozen
class Endpoint:
    """A host and a port; the host is a name or a literal IPv4 or IPv6 address."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``host:port`` or ``[v6]:port``. Raise `AddressError` on anything else."""
        match = _ENDPOINT.fullmatch(text)
        if not match or int(match["port"]) > 65535:
            raise AddressError(f"{text!r} is not HOST:PORT or [IPV6]:PORT with a port up to 65535")
        if match["v6"]:
            try:
                ipaddress.IPv6Address(match["v6"])
            except ValueError as exc:
                raise AddressError(f"{match['v6']!r} in {text!r} is not an IPv6 address") from exc
        return cls(match["v6"] or match["host"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def resolve(endpoint: Endpoint, flags: int = 0) -> list[Any]:
    """What getaddrinfo says of the endpoint for TCP. Raise socket.gaierror when it is no host."""
    try:
        # A literal address needs no name service, and so no thread to wait for one.
        return socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        return await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=flags)


def hang_up(sock: socket.socket) -> None:
    """Let the transport that owns ``sock`` read the end of its stream, on which it closes the socket.

    This is how a TLS handshake is given up: an event loop that is cancelled there may forget the socket.
    """
    with contextlib.suppress(OSError):  # the other side, or the owner, was faster
        sock.shutdown(socket.SHUT_RD)


OnAccepted = Callable[[socket.socket, Reservation], None]
"""Takes a connected, non-blocking socket and the reservation of its descriptor, to release with it."""


class Listener:
    """Accepts connections on one endpoint and hands over their sockets.

    Each is counted among those of unproven peers. Where there is no room for one more, the oldest that has
    proven nothing is hung up on: an honest peer needs two round trips, so it is the likeliest to be idle.

    Not the event loop's server, which makes a transport of every socket: uvloop's reads at once, so that the
    first bytes of a TLS handshake are lost before TLS is there, and none of them lets go of a socket whose
    handshake hangs.
    """

    def __init__(
        self, sockets: list[socket.socket], on_accepted: OnAccepted, resources: Callable[[], ResourceManager]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._on_accepted = on_accepted
        self._resources = resources
        self._pauses: set[asyncio.TimerHandle] = set()
        self.endpoints = [Endpoint(*sock.getsockname()[:2]) for sock in sockets]
        for sock in sockets:
            self._loop.add_reader(sock, self._accept, sock)

    @classmethod
    async def bind(
        cls,
        endpoint: Endpoint,
        on_accepted: OnAccepted,
        resources: Callable[[], ResourceManager],
        *,
        purpose: str = "listen",
    ) -> Listener:
        """Listen on all addresses of ``endpoint``'s host.

        Raise `AddressInUseError` or `AddressError` when that cannot be; ``purpose`` is the verb in its text.
        """
        sockets: list[socket.socket] = []
        try:
            for family, _, _, _, address in dict.fromkeys(await resolve(endpoint, socket.AI_PASSIVE)):
                sockets.append(socket.create_server(address, family=family, backlog=_BACKLOG))
                sockets[-1].setblocking(False)
            return cls(sockets, on_accepted, resources)
        except BaseException as exc:
            for sock in sockets:
                sock.close()
            if not isinstance(exc, OSError):
                raise
            refused = f"cannot {purpose} on {endpoint}"
            if isinstance(exc, socket.gaierror):
                raise AddressError(f"{refused}: {endpoint.host!r} is not a host here") from exc
            if exc.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"{refused}: the port is in use; choose another, or 0 for any free one"
                ) from exc
            reason = os.strerror(exc.errno) if exc.errno else str(exc)
            raise AddressError(f"{refused}: {reason}") from exc

    def close(self) -> None:
        """Stop listening; what has been handed over stays."""
        for pause in self._pauses:
            pause.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_MAX_AT_ONCE):
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:  # out of file descriptors or memory: those that wait go on waiting
                logger.error("cannot accept connections for %g s: %s", _PAUSE, exc)
                self._loop.remove_reader(listening)
                self._pauses.add(self._loop.call_later(_PAUSE, self._resume, listening))
                return
            sock.setblocking(False)
            # Event loops do this for sockets of their own making. Without it small frames, such as those
            # that give a sender credit, wait for the peer to acknowledge the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                reservation = self._resources().reserve(
                    None, Resource.DESCRIPTORS, priority=Priority.MEDIUM, evict=partial(hang_up, sock)
                )
            except ResourceLimitError as exc:
                logger.debug("refused an incoming connection: %s", exc)
                sock.close()
            else:
                self._on_accepted(sock, reservation)

    def _resume(self, listening: socket.socket) -> None:
        self._pauses = {pause for pause in self._pauses if pause.when() > self._loop.time()}
        self._loop.add_reader(listening, self._accept, listening)

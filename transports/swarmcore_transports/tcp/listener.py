"""Listening sockets, and what comes in on them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from swarmcore_transports.tcp.endpoint import Endpoint, resolve

logger = logging.getLogger(__name__)

_BACKLOG = 512
_AT_ONCE = 64  # accepted before other callbacks get their turn
_PAUSE = 1.0

Arrived = Callable[[socket.socket], None]
"""Takes a connected, non-blocking socket."""


class Listener:
    """Accepts connections on one endpoint and hands over their sockets.

    Not the event loop's server, which makes a transport of every socket: uvloop's reads at once, so that the
    first bytes of a TLS handshake are lost before TLS is there, and none of them lets go of a socket whose
    handshake hangs.
    """

    def __init__(self, sockets: list[socket.socket], arrived: Arrived) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._arrived = arrived
        self._pauses: set[asyncio.TimerHandle] = set()
        self.endpoints = [Endpoint(*sock.getsockname()[:2]) for sock in sockets]
        for sock in sockets:
            self._loop.add_reader(sock, self._accept, sock)

    @classmethod
    async def bind(cls, endpoint: Endpoint, arrived: Arrived) -> Listener:
        """Listen on all addresses of ``endpoint``'s host. Raise OSError, of which socket.gaierror is one."""
        sockets: list[socket.socket] = []
        try:
            for family, _, _, _, address in dict.fromkeys(await resolve(endpoint, socket.AI_PASSIVE)):
                sockets.append(socket.create_server(address, family=family, backlog=_BACKLOG))
                sockets[-1].setblocking(False)
            return cls(sockets, arrived)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise

    def close(self) -> None:
        """Stop listening; what has been handed over stays."""
        for pause in self._pauses:
            pause.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
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
            self._arrived(sock)

    def _resume(self, listening: socket.socket) -> None:
        self._pauses = {pause for pause in self._pauses if pause.when() > self._loop.time()}
        self._loop.add_reader(listening, self._accept, listening)

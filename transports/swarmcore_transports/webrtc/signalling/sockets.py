"""The sockets of a signalling service, counted from their acceptance on."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast

import attrs

from swarmcore.resources import Reservation, ResourceManager
from swarmcore.types import PeerId
from swarmcore_transports.listener import Endpoint, Listener, hang_up

logger = logging.getLogger(__name__)


@attrs.frozen
class Accepted:
    """A connection that is counted."""

    reservation: Reservation
    late: asyncio.TimerHandle

    def prove(self, peer: PeerId) -> None:
        """It is that of ``peer`` and stays. Raise `ResourceLimitError` when that has too many."""
        self.reservation.prove(peer)
        self.reservation.keep()
        self.late.cancel()

    def over(self) -> None:
        """It is gone."""
        self.late.cancel()
        self.reservation.release()


class SignallingSockets:
    """Gives each connection to a protocol that ``make`` makes.

    One whose peer is not proven within ``patience`` seconds is hung up on, whether it is silent, hangs in TLS
    or in the head of its request; the oldest of them sooner, where others need the room.
    """

    def __init__(
        self,
        resources: ResourceManager,
        make: Callable[[], asyncio.Protocol],
        patience: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._resources = resources
        self._make = make
        self._patience = patience
        self._tls = tls
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, endpoint: Endpoint) -> int:
        """Accept connections from now on; return the port. Raise `AddressError` when that cannot be."""
        self._listener = await Listener.bind(
            endpoint, self._accepted, lambda: self._resources, purpose="serve signalling"
        )
        return self._listener.endpoints[0].port

    def close(self) -> None:
        """Accept no more. Connections that are past TLS stay."""
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()

    def _accepted(self, sock: socket.socket, reservation: Reservation) -> None:
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._patience, hang_up, sock)
        task = loop.create_task(self._accept(sock, Accepted(reservation, late)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, sock: socket.socket, accepted: Accepted) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Counted(self._make(), accepted),
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=self._patience if self._tls else None,
            )
        except OSError as exc:
            logger.debug("refused an incoming connection: %r", exc)
            accepted.over()
        except BaseException:
            sock.close()
            accepted.over()
            raise


def accepted(transport: asyncio.BaseTransport | None) -> Accepted | None:
    """What counts the connection of ``transport``; None when that is gone."""
    protocol = transport.get_protocol() if transport is not None else None
    return protocol.accepted if isinstance(protocol, _Counted) else None


class _Counted(asyncio.Protocol):
    """Passes everything on to ``inner`` and ends the count with the connection."""

    def __init__(self, inner: asyncio.Protocol, accepted: Accepted) -> None:
        self._inner = inner
        self.accepted = accepted
        self.data_received = inner.data_received  # type: ignore[method-assign]
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(cast(asyncio.Transport, transport))

    def connection_lost(self, exc: Exception | None) -> None:
        self.accepted.over()
        self._inner.connection_lost(exc)

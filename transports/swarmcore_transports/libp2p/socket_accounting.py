"""The sockets that the trio thread has open, accounted in the event loop with those of other transports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from swarmcore.errors import ResourceLimitError
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.types import PeerId

logger = logging.getLogger(__name__)


class Cuttable(Protocol):
    """A socket of the trio thread."""

    def cut(self) -> None:
        """End the connection. Called in the trio thread."""


class SocketAccounting:
    """Reserves a descriptor for each socket, for the unproven until `proven`; cuts those that get none.

    `opened`, `proven` and `closed` are called in the trio thread, the rest happens in the event loop.
    ``call_soon_asyncio`` calls a function in the event loop, ``call_soon_trio`` one in the trio thread, where
    ``close_idle_connection`` is called when accepted sockets are at their bound.
    """

    def __init__(
        self,
        own: PeerId,
        resources: Callable[[], ResourceManager],
        *,
        call_soon_asyncio: Callable[[Callable[[], object]], object],
        call_soon_trio: Callable[[Callable[[], object]], object],
        close_idle_connection: Callable[[], object],
    ) -> None:
        self._own = own
        self._resources = resources
        self._call_soon_asyncio = call_soon_asyncio
        self._call_soon_trio = call_soon_trio
        self._close_idle_connection = close_idle_connection
        self._held: dict[Cuttable, Reservation] = {}

    def opened(self, sock: Cuttable, *, dialled: bool) -> None:
        """``sock`` is connected; one that this side has dialled counts as its own."""
        self._call_soon_asyncio(partial(self._reserve, sock, dialled))

    def proven(self, sock: Cuttable, peer: PeerId) -> None:
        """``peer`` is at the other end."""
        self._call_soon_asyncio(partial(self._prove, sock, peer))

    def closed(self, sock: Cuttable) -> None:
        """``sock`` is closed."""
        self._call_soon_asyncio(partial(self._release, sock))

    def _reserve(self, sock: Cuttable, dialled: bool) -> None:
        try:
            self._held[sock] = self._resources().reserve(
                self._own if dialled else None,
                Resource.DESCRIPTORS,
                priority=Priority.HIGH if dialled else Priority.MEDIUM,
                evict=None if dialled else partial(self._call_soon_trio, sock.cut),
            )
        except ResourceLimitError as exc:
            logger.debug("a connection is cut: %s", exc)
            self._call_soon_trio(sock.cut)
            self._call_soon_trio(self._close_idle_connection)

    def _prove(self, sock: Cuttable, peer: PeerId) -> None:
        held = self._held.get(sock)
        if held is None:
            return
        try:
            held.prove(peer)
            held.keep()
        except ResourceLimitError as exc:
            logger.debug("a connection is cut: %s", exc)
            self._call_soon_trio(sock.cut)

    def _release(self, sock: Cuttable) -> None:
        if (held := self._held.pop(sock, None)) is not None:
            held.release()

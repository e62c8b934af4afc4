"""The sockets that the trio thread has open, counted in the event loop with those of other transports."""

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


class SocketCounts:
    """Reserves a descriptor for each socket, for the unproven until `proven`; cuts those that get none.

    `opened`, `proven` and `closed` are called in the trio thread, the rest happens in the event loop.
    ``tell`` calls a function in the event loop, ``post`` one in the trio thread, where ``make_room`` is
    called when accepted sockets are at their bound.
    """

    def __init__(
        self,
        own: PeerId,
        resources: Callable[[], ResourceManager],
        *,
        tell: Callable[[Callable[[], object]], object],
        post: Callable[[Callable[[], object]], object],
        make_room: Callable[[], object],
    ) -> None:
        self._own = own
        self._resources = resources
        self._tell = tell
        self._post = post
        self._make_room = make_room
        self._held: dict[Cuttable, Reservation] = {}

    def opened(self, sock: Cuttable, *, dialled: bool) -> None:
        """``sock`` is connected; one that this side has dialled counts as its own."""
        self._tell(partial(self._reserve, sock, dialled))

    def proven(self, sock: Cuttable, peer: PeerId) -> None:
        """``peer`` is at the other end."""
        self._tell(partial(self._prove, sock, peer))

    def closed(self, sock: Cuttable) -> None:
        """``sock`` is closed."""
        self._tell(partial(self._release, sock))

    def _reserve(self, sock: Cuttable, dialled: bool) -> None:
        try:
            self._held[sock] = self._resources().reserve(
                self._own if dialled else None,
                Resource.DESCRIPTORS,
                priority=Priority.HIGH if dialled else Priority.MEDIUM,
                evict=None if dialled else partial(self._post, sock.cut),
            )
        except ResourceLimitError as exc:
            logger.debug("a connection is cut: %s", exc)
            self._post(sock.cut)
            self._post(self._make_room)

    def _prove(self, sock: Cuttable, peer: PeerId) -> None:
        held = self._held.get(sock)
        if held is None:
            return
        try:
            held.prove(peer)
            held.keep()
        except ResourceLimitError as exc:
            logger.debug("a connection is cut: %s", exc)
            self._post(sock.cut)

    def _release(self, sock: Cuttable) -> None:
        if (held := self._held.pop(sock, None)) is not None:
            held.release()

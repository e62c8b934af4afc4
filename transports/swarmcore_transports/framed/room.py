"""The memory that one stream's unread messages take, reserved before its sender is granted credit for it."""

from __future__ import annotations

from collections.abc import Callable

from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.types import PeerId
from swarmcore_transports.framed.flow import Inbox


class Room:
    """Reserves what `Inbox` lets come in from ``peer``.

    The first window is reserved here, or `ResourceLimitError` raised. Wider windows have the lowest priority:
    without one a stream is slower, and works. Whole messages wait for room in turn, of which windows leave
    enough; ``admitted`` is called when the one that arrives has got it.
    """

    def __init__(
        self,
        resources: ResourceManager,
        peer: PeerId,
        window: int,
        inbox: Inbox,
        admitted: Callable[[], object],
    ) -> None:
        self._resources = resources
        self._peer = peer
        self._inbox = inbox
        self._on_admitted = admitted
        self._window = resources.reserve(peer, Resource.BYTES, window)
        self._message: Reservation | None = None  # the message in front of all, if it was admitted
        self._in_hand: Reservation | None = None  # the one taken last, until the next is asked for
        self._withdraw: Callable[[], None] | None = None

    def look(self) -> None:
        """Reserve what the inbox could use now. Raise `ResourceLimitError` for a message that never fits."""
        if more := self._inbox.widening:
            wider = self._window.amount + more
            if self._resources.fits(self._peer, Resource.BYTES, more, Priority.LOW):
                self._window.resize(wider, Priority.LOW)
                self._inbox.widen(more)
        if self._withdraw is None and (size := self._inbox.to_admit):
            self._withdraw = self._resources.when_free(
                self._peer, Resource.BYTES, size, self._admit, priority=Priority.MEDIUM
            )

    def _admit(self, reservation: Reservation) -> None:
        self._message = reservation
        self._inbox.admit()
        self._on_admitted()

    def arrived(self) -> None:
        """The message is whole: from here on it needs no more room."""
        if self._withdraw is not None:
            self._withdraw()
            self._withdraw = None

    def taken(self) -> None:
        """The application has the message in front of all."""
        self._in_hand, self._message = self._message, None

    def used(self) -> None:
        """The application is through with what it took last, as it asks for the next."""
        if self._in_hand is not None:
            self._in_hand.release()
            self._in_hand = None

    def release(self) -> None:
        """The stream is over."""
        self.arrived()
        self.used()
        if self._message is not None:
            self._message.release()
            self._message = None
        self._window.release()

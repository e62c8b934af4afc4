"""What a session keeps in case that its client asks again, counted among all that peers make a node hold."""

from __future__ import annotations

from collections.abc import Callable

from swarmcore.errors import ResourceLimitError
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.types import PeerId


class Kept:
    """A part of a session's memory that can be done without: outputs for steps and replays that come again.

    It makes room for whatever else peers need, the oldest of them first, and is dropped when it would pass
    its peer's bound: ``drop`` is called then, and has to forget it. What was dropped costs the client a
    replay, never a wrong result.
    """

    def __init__(self, resources: ResourceManager, peer: PeerId, drop: Callable[[], None]) -> None:
        self.nbytes = 0
        self._resources = resources
        self._peer = peer
        self._drop = drop
        self._reservation: Reservation | None = None

    def resize(self, nbytes: int) -> None:
        """It takes so many bytes from now on. When there is no room for them, it is dropped."""
        if nbytes == self.nbytes:
            return
        try:
            if self._reservation is None:
                self._reservation = self._resources.reserve(
                    self._peer, Resource.BYTES, nbytes, priority=Priority.MEDIUM, evict=self._evicted
                )
            else:
                self._reservation.resize(nbytes, Priority.MEDIUM)
        except ResourceLimitError:
            self.close()
            self._drop()
        else:
            self.nbytes = nbytes

    def close(self) -> None:
        """Nothing is kept any more."""
        self.nbytes = 0
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None

    def _evicted(self) -> None:
        self._reservation, self.nbytes = None, 0
        self._drop()

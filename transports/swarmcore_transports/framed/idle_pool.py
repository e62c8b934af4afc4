"""Which idle connections are kept, and for how long."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from swarmcore.types import PeerId

T = TypeVar("T")


class IdlePool(Generic[T]):
    """Idle connections by peer, the most recently used taken first, the oldest given up first.

    A plain object: ``now`` is passed in, and what it gives up is returned for the caller to close.
    """

    def __init__(self, *, per_peer: int, total: int, keep: float) -> None:
        self._per_peer = per_peer
        self._total = total
        self._keep = keep
        self._idle: OrderedDict[T, tuple[PeerId, float]] = OrderedDict()
        self._of_peer: dict[PeerId, list[T]] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def put(self, peer: PeerId, connection: T, now: float) -> list[T]:
        """Keep ``connection``; return those that must go to make memory."""
        self._idle[connection] = (peer, now)
        of_peer = self._of_peer.setdefault(peer, [])
        of_peer.append(connection)
        evicted = []
        if len(of_peer) > self._per_peer:
            evicted.append(of_peer[0])
            self.remove(of_peer[0])
        while len(self._idle) > self._total:
            oldest = next(iter(self._idle))
            evicted.append(oldest)
            self.remove(oldest)
        return evicted

    def take(self, peer: PeerId) -> T | None:
        """The connection to ``peer`` that was used last, no longer kept here."""
        of_peer = self._of_peer.get(peer)
        if not of_peer:
            return None
        connection = of_peer[-1]
        self.remove(connection)
        return connection

    def remove(self, connection: T) -> None:
        """Forget ``connection``, if it is here."""
        entry = self._idle.pop(connection, None)
        if entry is None:
            return
        of_peer = self._of_peer[entry[0]]
        of_peer.remove(connection)
        if not of_peer:
            del self._of_peer[entry[0]]

    def expire(self, now: float) -> list[T]:
        """Forget and return the connections that have been idle for ``keep`` seconds."""
        expired = []
        for connection, (_, since) in self._idle.items():
            if now - since < self._keep:
                break
            expired.append(connection)
        for connection in expired:
            self.remove(connection)
        return expired

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None when nothing is idle."""
        return next((since + self._keep for _, since in self._idle.values()), None)

"""The ring of members: an order that all agree on, so that everyone is watched by someone."""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Collection

from swarmcore.registry.digest import Key, key_of
from swarmcore.types import PeerId


class Ring:
    """Peers in the order of the hashes of their ids. ``own`` has a place on it without being listed."""

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._key = key_of(own)
        self._places: list[tuple[Key, PeerId]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, peer: PeerId) -> None:
        """Harmless when repeated."""
        place = (key_of(peer), peer)
        at = bisect(self._places, place)
        if peer != self._own and (at == 0 or self._places[at - 1] != place):
            insort(self._places, place)

    def discard(self, peer: PeerId) -> None:
        place = (key_of(peer), peer)
        at = bisect(self._places, place) - 1
        if at >= 0 and self._places[at] == place:
            del self._places[at]

    def successors(self, count: int, skipped: Collection[PeerId] = ()) -> list[PeerId]:
        """The next ``count`` peers after ``own``, those in ``skipped`` passed over."""
        start = bisect(self._places, (self._key, self._own))
        found: list[PeerId] = []
        for step in range(len(self._places)):
            if len(found) == count:
                break
            peer = self._places[(start + step) % len(self._places)][1]
            if peer not in skipped:
                found.append(peer)
        return found

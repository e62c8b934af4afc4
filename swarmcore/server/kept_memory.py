"""Memory that clients make a server keep beside the attention cache. A plain object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import attrs

from swarmcore.types import PeerId

KEPT_BUDGET = 256 * 2**20
"""Bytes to keep where the free memory is not known."""


@attrs.define(eq=False)
class Keeping:
    """What one session keeps of one kind."""

    peer: PeerId
    drop: Callable[[], None]
    """Called when it has to go: forget it, and whatever comes to ask for it is told so."""
    nbytes: int = 0


class KeptMemory:
    """At most ``budget`` bytes of outputs that sessions keep, in case that their clients ask for them again.

    That is answers for steps which are sent again, and outputs for replays. Where there are more, the peer
    that keeps most loses what it has added to least recently: one peer cannot take what another one has
    within an equal share. What was dropped costs its client a replay, never a wrong result.
    """

    def __init__(self, budget: int = KEPT_BUDGET) -> None:
        self.budget = budget
        self.dropped = 0
        """How often something had to go."""
        self._keepings: dict[Keeping, None] = {}  # the last that grew is the last
        self._by_peer: Counter[PeerId] = Counter()

    @property
    def nbytes(self) -> int:
        """What is kept now."""
        return self._by_peer.total()

    def open(self, peer: PeerId, drop: Callable[[], None]) -> Keeping:
        """Begin to keep something for ``peer``; `close` has to follow."""
        return Keeping(peer, drop)

    def resize(self, keeping: Keeping, nbytes: int) -> None:
        """It takes ``nbytes`` bytes from now on; something is dropped, possibly this, when it is too much."""
        grown = nbytes > keeping.nbytes
        self._by_peer[keeping.peer] += nbytes - keeping.nbytes
        keeping.nbytes = nbytes
        if grown:
            self._keepings.pop(keeping, None)
        if nbytes:
            self._keepings.setdefault(keeping)
        else:
            self._forget(keeping)
        while self.nbytes > self.budget:
            [(largest, _)] = self._by_peer.most_common(1)
            oldest = next(each for each in self._keepings if each.peer == largest)
            self._by_peer[largest] -= oldest.nbytes
            oldest.nbytes = 0
            self._forget(oldest)
            self.dropped += 1
            oldest.drop()

    def close(self, keeping: Keeping) -> None:
        """Nothing is kept in it any more."""
        self.resize(keeping, 0)

    def _forget(self, keeping: Keeping) -> None:
        self._keepings.pop(keeping, None)
        if not self._by_peer[keeping.peer]:
            del self._by_peer[keeping.peer]

    def __repr__(self) -> str:
        return f"<KeptMemory {self.nbytes}/{self.budget} bytes of {len(self._by_peer)} peers>"

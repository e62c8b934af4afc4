"""Which offers of others are answered: each once, and not too many at a time."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from swarmcore.types import PeerId

MAX_ANSWERING = 64
"""Most offers that are being answered at a time; further ones are refused, or the oldest makes room."""

MAX_ANSWERING_PEER = 4
"""And of one peer."""

FAIR_SECONDS = 3.0
"""Seconds that an offer has for sure: peers that mean it are connected by then, most of them."""

_REMEMBERED = 4096


@attrs.define(eq=False)
class Answering:
    """An offer that is being answered."""

    peer: PeerId
    since: float
    give_up: Callable[[], object] = lambda: None
    """To be set by whoever answers it; called when it has to make room."""


@attrs.define
class Offers:
    """Keeps count. A plain object: whoever answers says when it begins and ends; ``now`` is passed in."""

    most: int = MAX_ANSWERING
    most_of_peer: int = MAX_ANSWERING_PEER
    _seen: dict[bytes, None] = attrs.field(factory=dict)  # the oldest first
    _answering: dict[Answering, None] = attrs.field(factory=dict)  # the oldest first

    def __len__(self) -> int:
        """How many are being answered."""
        return len(self._answering)

    def is_new(self, exchange: bytes) -> bool:
        """Whether this offer comes for the first time; it is remembered, among the latest 4096."""
        if exchange in self._seen:
            return False
        self._seen[exchange] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True

    def begin(self, peer: PeerId, now: float) -> Answering | None:
        """Begin to answer ``peer``; None when there are too many already, of it or of all.

        Of all, the oldest makes room if it has had its `FAIR_SECONDS`: those who never complete their offers
        would keep everybody else out.
        """
        if sum(one.peer == peer for one in self._answering) >= self.most_of_peer:
            return None
        if len(self) >= self.most:
            oldest = next(iter(self._answering))
            if now - oldest.since < FAIR_SECONDS:
                return None
            self.end(oldest)
            oldest.give_up()
        answering = Answering(peer, now)
        self._answering[answering] = None
        return answering

    def end(self, answering: Answering) -> None:
        """It was answered, or given up. Harmless when repeated."""
        self._answering.pop(answering, None)

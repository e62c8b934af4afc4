"""Which offers of others are answered: each once, and not too many at a time."""

from __future__ import annotations

from collections import Counter

import attrs

from swarmcore.types import PeerId

MAX_ANSWERING = 64
"""Most offers that are being answered at a time; further ones are refused."""

MAX_ANSWERING_PEER = 4
"""And of one peer."""

_REMEMBERED = 4096


@attrs.define
class Offers:
    """Keeps count. A plain object: whoever answers says when it begins and ends."""

    most: int = MAX_ANSWERING
    most_of_peer: int = MAX_ANSWERING_PEER
    _seen: dict[bytes, None] = attrs.field(factory=dict)  # the oldest first
    _answering: Counter[PeerId] = attrs.field(factory=Counter)

    def __len__(self) -> int:
        """How many are being answered."""
        return self._answering.total()

    def is_new(self, exchange: bytes) -> bool:
        """Whether this offer comes for the first time; it is remembered, among the latest 4096."""
        if exchange in self._seen:
            return False
        self._seen[exchange] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True

    def begin(self, peer: PeerId) -> bool:
        """Begin to answer ``peer``, unless there are too many already."""
        if len(self) >= self.most or self._answering[peer] >= self.most_of_peer:
            return False
        self._answering[peer] += 1
        return True

    def end(self, peer: PeerId) -> None:
        """The answer to ``peer`` was given, or given up."""
        self._answering[peer] -= 1
        if self._answering[peer] <= 0:
            del self._answering[peer]

"""How often somebody may ask."""

from __future__ import annotations

from collections import OrderedDict

import attrs

from swarmcore.types import PeerId


@attrs.define
class RateLimit:
    """A bucket of ``burst`` tokens that fills at ``rate`` a second. A plain object: ``now`` is passed in."""

    rate: float
    burst: float
    _level: float = attrs.field(init=False)
    _at: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._level = self.burst

    def take(self, now: float) -> bool:
        """Whether one more is allowed now."""
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True


class PeerRates:
    """A `RateLimit` for each peer; of more than ``most`` peers, those that asked last are remembered."""

    def __init__(self, rate: float, burst: float, *, most: int = 4096) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._of: OrderedDict[PeerId, RateLimit] = OrderedDict()

    def take(self, peer: PeerId, now: float) -> bool:
        """Whether ``peer`` is allowed one more now."""
        limit = self._of.pop(peer, None) or RateLimit(self._rate, self._burst)
        self._of[peer] = limit
        if len(self._of) > self._most:
            self._of.popitem(last=False)
        return limit.take(now)

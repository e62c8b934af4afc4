"""How often somebody may ask."""

from __future__ import annotations

import attrs


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

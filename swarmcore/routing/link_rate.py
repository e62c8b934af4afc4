"""How fast a link is, from transfers of different sizes."""

from __future__ import annotations

import math

import attrs

WEIGHT = 0.2
"""Of a new transfer against what was known before: five of them forget two thirds of it."""

SPREAD = 0.1
"""Relative deviation of the sizes from which on a line through them is worth more than their mean."""


@attrs.define
class LinkRate:
    """Fits ``seconds = delay + nbytes / rate`` to the transfers seen, the recent ones counting most.

    The delay has to be kept apart: a small transfer spends most of its time on it, and taken for a low rate
    it would make a fast link look slow for as long as only little is sent over it.
    """

    weight: float = WEIGHT
    _total: float = 0.0
    _nbytes: float = 0.0
    _seconds: float = 0.0
    _square: float = 0.0
    _product: float = 0.0

    def __bool__(self) -> bool:
        """Whether any transfer was seen."""
        return self._total > 0

    def measured(self, nbytes: int, seconds: float) -> None:
        """Take in one transfer. One that cannot be (no bytes, a time that is not finite) is passed over."""
        if nbytes <= 0 or not math.isfinite(seconds) or seconds < 0:
            return
        keep = 1 - self.weight
        self._total = keep * self._total + 1
        self._nbytes = keep * self._nbytes + nbytes
        self._seconds = keep * self._seconds + seconds
        self._square = keep * self._square + float(nbytes) ** 2
        self._product = keep * self._product + nbytes * seconds

    @property
    def seconds_per_byte(self) -> float:
        """0 before the first transfer."""
        if not self:
            return 0.0
        mean, duration = self._nbytes / self._total, self._seconds / self._total
        proportional = duration / mean
        variance = self._square / self._total - mean**2
        if variance < (SPREAD * mean) ** 2:
            return proportional
        slope = (self._product / self._total - mean * duration) / variance
        # Neither end can be: a delay below nothing, or larger transfers that take no longer.
        return min(max(slope, proportional / 10), proportional)

    @property
    def delay(self) -> float:
        """Seconds of a transfer that do not depend on its size."""
        if not self:
            return 0.0
        return max(0.0, (self._seconds - self._nbytes * self.seconds_per_byte) / self._total)

    def seconds(self, nbytes: float) -> float:
        """What a transfer of ``nbytes`` is likely to take."""
        return self.delay + nbytes * self.seconds_per_byte

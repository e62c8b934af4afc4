"""Round trips to peers, as measured here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from swarmcore.types import PeerId

WEIGHT = 0.25
"""Of a new measurement against what was known before: four of them forget two thirds of it."""

CAPACITY = 4096


class Latencies:
    """Smoothed round trips by peer. A plain object: ``now`` is passed in.

    Holds ``capacity`` peers at most; one more takes the place of the one measured longest ago.
    """

    def __init__(self, *, weight: float = WEIGHT, capacity: int = CAPACITY) -> None:
        self._weight = weight
        self._capacity = capacity
        self._times: dict[PeerId, float] = {}  # in the order of measurement
        self._seconds: dict[PeerId, float] = {}
        self.seconds: Mapping[PeerId, float] = MappingProxyType(self._seconds)
        """The smoothed round trip of each peer; changes as measurements come in."""

    def __repr__(self) -> str:
        return f"<Latencies of {len(self._seconds)} peers>"

    def __len__(self) -> int:
        return len(self._seconds)

    def measured(self, peer: PeerId, seconds: float, now: float) -> None:
        """Take in one round trip, measured at ``now``."""
        before = self._seconds.get(peer)
        self._seconds[peer] = seconds if before is None else before + self._weight * (seconds - before)
        self._times.pop(peer, None)
        self._times[peer] = now
        if len(self._times) > self._capacity:
            self.forget(next(iter(self._times)))

    def age(self, peer: PeerId, now: float) -> float:
        """Seconds since ``peer`` was last measured; infinite when it never was."""
        at = self._times.get(peer)
        return float("inf") if at is None else now - at

    def forget(self, peer: PeerId) -> None:
        """Harmless when ``peer`` is not known."""
        self._times.pop(peer, None)
        self._seconds.pop(peer, None)

"""One direction of an emulated link: when each packet arrives, and which do not."""

from __future__ import annotations

import random
from collections import deque

import attrs

LONGEST_QUEUE = 0.1
"""Seconds that a packet may wait for those before it to leave; a router would drop it too."""

MOST_PACKETS = 2**14
"""On the way at once, whatever the delay and the rate."""


@attrs.define
class DelayLine:
    """Takes packets and gives them back ``delay`` seconds later, in order. ``now`` is the caller's clock.

    ``loss`` is the share that vanishes, chosen by ``rng``. ``rate``, in bytes per second, is how fast packets
    leave one after the other; those that would wait longer than `LONGEST_QUEUE` are dropped.
    """

    delay: float
    loss: float
    rate: float
    rng: random.Random
    taken: int = 0
    lost: int = 0
    """By chance, as was asked for."""
    dropped: int = 0
    """For want of room."""
    _free_at: float = float("-inf")
    _on_the_way: deque[tuple[float, bytes]] = attrs.field(factory=deque)

    def put(self, packet: bytes, now: float) -> None:
        """``packet`` comes in."""
        self.taken += 1
        if self.loss and self.rng.random() < self.loss:
            self.lost += 1
            return
        starts = max(now, self._free_at)
        if starts - now > LONGEST_QUEUE or len(self._on_the_way) >= MOST_PACKETS:
            self.dropped += 1
            return
        self._free_at = starts + len(packet) / self.rate
        self._on_the_way.append((self._free_at + self.delay, packet))

    def take(self, now: float) -> tuple[float, bytes] | None:
        """The next packet whose time has come, and when that was; None when none is due."""
        if self._on_the_way and self._on_the_way[0][0] <= now:
            return self._on_the_way.popleft()
        return None

    @property
    def next_at(self) -> float:
        """When the next packet is due; infinity when there is none."""
        return self._on_the_way[0][0] if self._on_the_way else float("inf")

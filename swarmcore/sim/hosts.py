"""Machines of a simulated network: where they are, and how fast they are connected."""

from __future__ import annotations

import math
import random
from collections import Counter

import attrs

from swarmcore.errors import InputError


@attrs.frozen(kw_only=True)
class Geography:
    """How hosts are spread over a plane, and what their links carry.

    The one-way delay between two hosts is ``floor`` milliseconds, plus what light and routers need for the
    distance: ``width`` milliseconds from one side of the plane to the other. With ``regions`` above 0 hosts
    stand close around as many places instead of anywhere. Each host draws one of ``megabits``, the rate of
    its link in both directions.
    """

    floor: float = 0.5
    width: float = 0.0
    regions: int = 0
    megabits: tuple[float, ...] = (1000.0,)

    def __attrs_post_init__(self) -> None:
        if self.floor <= 0 or self.width < 0 or self.regions < 0:
            raise InputError("a network needs a floor above 0, a width and regions of 0 or more")
        if not self.megabits or min(self.megabits) <= 0:
            raise InputError("megabits has to list rates above 0")


@attrs.define(eq=False)
class Host:
    """One machine. Its link is busy until ``up_free`` and ``down_free``, loop times.

    On its way in it has been busy for ``down_work`` seconds since it last had nothing to carry.
    """

    index: int
    x: float
    y: float
    rate: float
    """Bytes per second, each way."""
    up_free: float = 0.0
    down_free: float = 0.0
    down_work: float = 0.0
    island: int = 0
    """Hosts of different islands cannot hear each other."""
    hung: bool = False
    """Its processes stand still; the machine itself still takes what comes."""
    power: bool = True
    boots: int = 0
    """How often its process was started: connections to an earlier one are of no use."""
    sent: Counter[str] = attrs.field(factory=Counter, repr=False)
    """Bytes sent so far, by the method or protocol they were for."""
    received: Counter[str] = attrs.field(factory=Counter, repr=False)
    idle: dict[int, list[tuple[float, int]]] = attrs.field(factory=dict, repr=False)
    """Connections kept for later, by the host they lead to: until when, and to which of its boots."""

    def hears(self, other: Host) -> bool:
        """Whether anything gets through between the two."""
        return self is other or (
            self.island == other.island and not (self.hung or other.hung) and self.power and other.power
        )

    def schedule_arrival(self, size: float, now: float) -> float:
        """When ``size`` bytes are here that would be here ``now``, had the link nothing else to carry.

        They shared the link with whatever came while they were on their way, small things that overtook
        them as well.
        """
        takes = size / self.rate
        begin = now - takes
        if self.down_free <= begin + 1e-9:
            self.down_free, self.down_work = now, takes
            return now
        self.down_work += takes
        # What was carried since began when the link became busy, or with these bytes if that was earlier.
        busy_since = min(self.down_free - (self.down_work - takes), begin)
        self.down_free = max(now, busy_since + self.down_work)
        return self.down_free


class HostMaker:
    """Places hosts on the plane of a `Geography`, and knows the delay between any two."""

    def __init__(self, geography: Geography, rng: random.Random) -> None:
        self._geography = geography
        self._rng = rng
        self._centres = [(rng.random(), rng.random()) for _ in range(geography.regions)]

    def make(self, index: int, *, megabits: float | None = None) -> Host:
        """The next host, with a link of ``megabits`` or of a rate drawn for it."""
        x, y = self._rng.random(), self._rng.random()
        if self._centres:
            centre = self._centres[self._rng.randrange(len(self._centres))]
            x, y = centre[0] + 0.05 * (x - 0.5), centre[1] + 0.05 * (y - 0.5)
        drawn = self._rng.choice(self._geography.megabits)
        return Host(index, x, y, (megabits or drawn) * 1e6 / 8)

    def delay(self, one: Host, other: Host) -> float:
        """Seconds from one to the other."""
        distance = math.hypot(one.x - other.x, one.y - other.y)
        return (self._geography.floor + self._geography.width * distance) / 1000

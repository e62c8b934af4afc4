"""Resource managers with narrow bounds."""

from __future__ import annotations

import attrs

from swarmcore.resources import Bounds, Machine, ResourceLimits, ResourceManager


def bounded(**bounds: Bounds) -> ResourceManager:
    """A manager with the bounds of an ordinary machine, but for those given by the name of the resource."""
    return ResourceManager(attrs.evolve(ResourceLimits.of(Machine(10_000, 2**33)), **bounds))

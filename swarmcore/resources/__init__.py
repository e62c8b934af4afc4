"""What remote peers may make this process hold: bounds for each and for all together, kept in one place."""

from swarmcore.resources.limits import Bounds, Machine, ResourceLimits
from swarmcore.resources.manager import ResourceManager, ResourceUse
from swarmcore.resources.reservation import Priority, Reservation, Resource

__all__ = [
    "Bounds",
    "Machine",
    "Priority",
    "Reservation",
    "Resource",
    "ResourceLimits",
    "ResourceManager",
    "ResourceUse",
]

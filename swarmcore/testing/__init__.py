"""Networks without a network: for tests of swarmcore, of plugins, and of applications."""

from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork, MemoryStream, MemoryTransport

__all__ = ["Faults", "FaultyTransport", "MemoryNetwork", "MemoryStream", "MemoryTransport"]

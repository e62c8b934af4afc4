"""Networks without a network: for tests of swarmcore, of plugins, and of applications."""

from swarmcore.testing.memory import MemoryNetwork, MemoryStream, MemoryTransport

__all__ = ["MemoryNetwork", "MemoryStream", "MemoryTransport"]

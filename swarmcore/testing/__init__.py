"""Networks without a network, blocks without a model: for tests of swarmcore, of plugins, of applications."""

from swarmcore.rpc.memory_stream import MemoryStream
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport

__all__ = [
    "CountingExecutor",
    "Faults",
    "FaultyTransport",
    "MemoryNetwork",
    "MemoryStream",
    "MemoryTransport",
]

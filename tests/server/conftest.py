"""A network in memory, and a client on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from swarmcore.identity import Identity
from swarmcore.rpc.node import Node
from swarmcore.testing.memory import MemoryNetwork


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
async def client(network: MemoryNetwork) -> AsyncIterator[Node]:
    identity = Identity.generate()
    async with Node(identity, [network.transport(identity, listen=False)]) as node:
        yield node

"""Nodes over the in-memory transport and over TCP, and the check that they leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from swarmcore.identity import Identity
from swarmcore.rpc import Node
from swarmcore.testing import MemoryNetwork
from swarmcore.transport import Transport, transport_class
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits

LIMITS = Limits(max_message=2**20, send_buffer=2**16)


class Nodes:
    """Makes nodes that can reach each other."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.made: list[Node] = []
        self._network = MemoryNetwork()

    def transport(self, identity: Identity, limits: Limits = LIMITS, *, listen: bool = True) -> Transport:
        if self.kind == "memory":
            return self._network.transport(identity, limits, listen=listen)
        return transport_class(self.kind)(
            identity, limits=limits, listen_on=["127.0.0.1:0"] if listen else []
        )

    async def start(
        self, *, limits: Limits = LIMITS, listen: bool = True, allowed_peers: Collection[PeerId] | None = None
    ) -> Node:
        identity = Identity.generate()
        transports = [self.transport(identity, limits, listen=listen)]
        node = Node(identity, transports, limits=limits, allowed_peers=allowed_peers)
        self.made.append(node)
        await node.start()
        return node


@pytest.fixture(params=["memory", "tcp"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    nodes = Nodes(request.param)
    yield nodes
    for node in nodes.made:
        await node.close()
        assert "0 calls in" in repr(node)
    for _ in range(3):  # a finished task is listed until its callbacks have run
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}

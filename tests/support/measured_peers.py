"""Peers that answer pings over an in-memory network, each at its own distance from everyone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import attrs

from swarmcore.identity import Identity
from swarmcore.registry.base import SwarmView
from swarmcore.rpc.node import Node
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import PING_METHOD

MODEL = ModelInfo("tiny", "f" * 32, blocks=12, hidden_size=8)


class MeasuredPeers:
    """Servers with a round trip of their own, in one view, and a node to measure from."""

    def __init__(self, node: Node, network: MemoryNetwork, stack: AsyncExitStack) -> None:
        self.node = node
        self.servers: dict[PeerId, ServerInfo] = {}
        self.pings: list[PeerId] = []
        """Who was pinged, in order."""
        self._network = network
        self._stack = stack

    def view(self) -> SwarmView:
        return SwarmView(dict(self.servers))

    async def add(self, start: int, end: int, rtt: float, **fields: Any) -> PeerId:
        """A server whose round trip is ``rtt`` seconds; its delay is on what it sends."""
        identity = Identity.generate()
        transport = FaultyTransport(self._network.transport(identity), Random(0), Faults(delay=rtt))
        node = await self._stack.enter_async_context(Node(identity, [transport]))

        async def pong(request: Ping, caller: Caller) -> Pong:
            self.pings.append(node.peer)
            return Pong(request.payload)

        node.serve(PING_METHOD, pong)
        self.announce(node, start, end, **fields)
        return node.peer

    def add_unreachable(self, start: int, end: int) -> PeerId:
        identity = Identity.generate()
        self._announce(identity.peer, (f"memory:nowhere/{identity.peer}",), start, end)
        return identity.peer

    def announce(self, node: Node, start: int, end: int, **fields: Any) -> None:
        self._announce(node.peer, tuple(map(str, node.addresses)), start, end, **fields)

    def change(self, peer: PeerId, **fields: Any) -> None:
        self.servers[peer] = attrs.evolve(self.servers[peer], **fields)

    def _announce(
        self, peer: PeerId, addresses: tuple[str, ...], start: int, end: int, **fields: Any
    ) -> None:
        self.servers[peer] = ServerInfo(
            peer, addresses, model=MODEL, span=Span(start, end), decode_rps=100 / (end - start), **fields
        )


@asynccontextmanager
async def measured_peers() -> AsyncIterator[MeasuredPeers]:
    network = MemoryNetwork()
    identity = Identity.generate()
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node(identity, [network.transport(identity)]))
        yield MeasuredPeers(node, network, stack)

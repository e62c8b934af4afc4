"""Swarms of gossip registries in one process, over any transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random

from swarmcore.identity import Identity
from swarmcore.registry.base import Registry
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.rpc import Node
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.testing.registry_contract import Member, RegistrySwarm
from swarmcore.transport import Transport
from swarmcore.types import Address, PeerId

EPOCH = 1_700_000_000.0

TransportFactory = Callable[[Identity, bool], Transport]
"""Makes the transport of a peer: one that listens, or a client's that does not."""


def faulty_memory(random: Random, faults: Faults | None = None) -> TransportFactory:
    """Transports of one `MemoryNetwork`, each wrapped in a `FaultyTransport`."""
    network = MemoryNetwork()
    return lambda identity, listen: FaultyTransport(
        network.transport(identity, listen=listen), random, faults
    )


class GossipSwarm(RegistrySwarm):
    """Members of one gossip swarm, each with its own node.

    Their wall clocks are the loop's time from `EPOCH` on, plus the seconds by which each is `clock_off`. The
    choices they make come from ``seed``: on a `VirtualClockLoop` and a memory network a run repeats itself.
    """

    def __init__(
        self,
        transport: TransportFactory | None = None,
        *,
        options: GossipOptions | None = None,
        seed: int = 0,
    ) -> None:
        network = MemoryNetwork()
        self.clock_off: dict[PeerId, float] = {}
        self.nodes: dict[PeerId, Node] = {}
        self.transports: dict[PeerId, Transport] = {}
        self.members: list[Member] = []
        """Those that run now, clients included."""
        self.make_transport = transport or (
            lambda identity, listen: network.transport(identity, listen=listen)
        )
        self._options = options or GossipOptions()
        self._random = Random(seed)

    async def join(self, identity: Identity | None = None, bootstrap: Sequence[str] | None = None) -> Member:
        """A new member that joins through ``bootstrap``; through the last one that joined when it is None."""
        identity = identity or self._new_identity()
        return await self._start(identity, bootstrap, watching=False)

    async def announced(self, count: int, *, ttl: float = 30.0) -> list[Member]:
        """``count`` new members, announced for ``ttl`` seconds, that all know each other."""
        members = [await self.join() for _ in range(count)]
        for member in members:
            await member.registry.announce(member.info(), ttl)
        for member in members:
            await self.until_known(member, *(m.info() for m in members))
        return members

    async def watch(self, bootstrap: Sequence[str] | None = None, *, clock_off: float = 0.0) -> Member:
        """A new client with a `WatchingRegistry`."""
        identity = self._new_identity()
        self.clock_off[identity.peer] = clock_off
        return await self._start(identity, bootstrap, watching=True)

    async def crash(self, member: Member) -> None:
        self.members.remove(member)
        transport = self.transports.pop(member.identity.peer)
        while (inner := getattr(transport, "inner", None)) is not None:  # unwrap faulty ones and the like
            transport = inner
        if isinstance(transport, MemoryTransport):
            await transport.crash()
        await member.registry.close()
        await self.nodes.pop(member.identity.peer).close()

    async def aclose(self) -> None:
        for member in self.members:  # all gossip ends before the first of those that are called goes away
            await member.registry.close()
        for node in self.nodes.values():
            await node.close()

    def split(self, one: Sequence[Member], other: Sequence[Member]) -> None:
        """Let nothing pass between two groups of members, whose transports are faulty ones."""
        for group, others in ((one, other), (other, one)):
            for member in group:
                self._faulty(member).partition(*(m.identity.peer for m in others))

    def hang(self, member: Member) -> None:
        """Let ``member``, whose transport is a faulty one, neither hear nor be heard, as if stopped."""
        self._faulty(member).partition()

    def heal(self) -> None:
        """End all splits and hangs."""
        for member in self.members:
            self._faulty(member).heal()

    def calls(self) -> int:
        """Calls made so far by all nodes that run now."""
        return sum(node.counters["calls_out"] for node in self.nodes.values())

    async def _start(self, identity: Identity, bootstrap: Sequence[str] | None, watching: bool) -> Member:
        if bootstrap is None:
            bootstrap = next((m.addresses for m in reversed(self.members) if m.addresses), ())
        transport = self.make_transport(identity, not watching)
        node = Node(identity, [transport])
        await node.start()
        addresses = [Address.parse(url) for url in bootstrap]
        rng = Random(self._random.random())
        registry: Registry
        if watching:
            registry = WatchingRegistry(
                node, addresses, options=self._options, rng=rng, wall_clock=self._clock_of(identity.peer)
            )
        else:
            registry = GossipRegistry(
                node, addresses, options=self._options, rng=rng, wall_clock=self._clock_of(identity.peer)
            )
        try:
            await registry.start()
        except BaseException:
            await registry.close()
            await node.close()
            raise
        member = Member(identity, registry, tuple(map(str, node.addresses)))
        self.nodes[identity.peer] = node
        self.transports[identity.peer] = transport
        self.members.append(member)
        return member

    def _new_identity(self) -> Identity:
        return Identity.from_seed(self._random.randbytes(32))

    def _clock_of(self, peer: PeerId) -> Callable[[], float]:
        return lambda: EPOCH + asyncio.get_running_loop().time() + self.clock_off.get(peer, 0.0)

    def _faulty(self, member: Member) -> FaultyTransport:
        transport = self.transports[member.identity.peer]
        assert isinstance(transport, FaultyTransport)
        return transport

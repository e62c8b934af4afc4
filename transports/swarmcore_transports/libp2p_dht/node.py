"""The trio side of the DHT registry: one node of the DHT on the transport's host."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from swarmcore.errors import PeerUnreachableError
from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.types import PeerId, short
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.patches.kad_dht import PROVIDER_TTL
from swarmcore_transports.libp2p.translation import translated
from swarmcore_transports.libp2p_dht.lookups import DhtOptions, Lookups
from swarmcore_transports.libp2p_dht.records import ValueRules, record_key, sequence_of
from swarmcore_transports.libp2p_dht.server import KAD, KademliaServer

logger = logging.getLogger(__name__)

_IDENTIFY_SECONDS = (0.02, 0.1, 0.3, 1.0, 3.0)
"""Pauses in which a newcomer says what it speaks."""
_EXPIRE_SECONDS = 60.0
_PAUSE_SECONDS = 5.0


class DhtNode:
    """Runs in the trio thread; every method but the constructor is called there.

    ``serving`` is for peers that others can dial: they store for others and are asked. A client only asks.
    ``on_record`` is called with each sound record that others store here.
    """

    def __init__(
        self,
        host: Host,
        rules: ValueRules,
        options: DhtOptions,
        *,
        serving: bool,
        on_record: Callable[[SignedRecord], None],
    ) -> None:
        self._host = host
        self._options = options
        self._serving = serving
        self._kademlia = KademliaServer(host, rules, options.capacity, serving=serving, on_record=on_record)
        self.lookups = Lookups(host, self._kademlia, options)
        self._provided_at: dict[bytes, dict[ID, float]] = {}
        self._stopped = trio.Event()

    @property
    def nodes(self) -> int:
        """Nodes in the routing table."""
        return self._kademlia.routing_table.size()

    async def run(self) -> None:
        """Live until `stop`."""
        async with trio.open_nursery() as nursery:
            for task in (
                self._add_newcomers,
                self._expire,
                self._refresh_table_forever,
                self.lookups.sender.run,
            ):
                nursery.start_soon(_run_forever, task)
            if self._serving:
                nursery.start_soon(self._host.push_identify)
            await self._stopped.wait()
            nursery.cancel_scope.cancel()
        if self._serving:
            self._host.stop_serving(KAD)

    def stop(self) -> None:
        self._stopped.set()

    async def _add_newcomers(self) -> None:
        async with trio.open_nursery() as nursery:
            async for peer in self._kademlia.newcomers:
                nursery.start_soon(self._add_when_identified, peer)

    async def _add_when_identified(self, peer: ID) -> None:
        for pause in _IDENTIFY_SECONDS:
            if self._host.supports(peer, KAD):
                await self.lookups.add_node(peer)
                return
            await trio.sleep(pause)

    async def _expire(self) -> None:
        while True:
            await trio.sleep(_EXPIRE_SECONDS)
            self._kademlia.expire()

    async def _refresh_table_forever(self) -> None:
        while True:
            await trio.sleep(self._options.upkeep)
            await self.refresh_table()

    async def refresh_table(self) -> None:
        """Look for the nodes nearest to this one, whose neighbour it becomes by asking them."""
        own = self._host.libp2p.get_id().to_bytes()
        await self.lookups.find_closest(Message.FIND_NODE, own, self._options.replicas)

    async def join(self, bootstrap: Sequence[tuple[PeerId, Sequence[Multiaddr]]]) -> None:
        """Become a node through any of ``bootstrap``. Raise `PeerUnreachableError` when none answers."""
        failures: list[str] = []

        async def connect(peer: PeerId, addresses: Sequence[Multiaddr]) -> None:
            node = ID.from_string(peer)
            self._host.libp2p.get_peerstore().add_addrs(node, list(addresses), int(PROVIDER_TTL))
            try:
                await self.lookups.sender.connect(node, addresses)
            except Exception as exc:
                failures.append(f"{short(peer)}: {translated(exc).message}")
                return
            if not await self._ping(node):
                failures.append(f"{short(peer)}: it does not speak {KAD}")
                return
            await self.lookups.add_node(node)

        async with trio.open_nursery() as nursery:
            for peer, addresses in bootstrap:
                nursery.start_soon(connect, peer, addresses)
        if bootstrap and len(failures) == len(bootstrap):
            raise PeerUnreachableError(f"no bootstrap peer serves the DHT: {'; '.join(failures)}")
        await self.refresh_table()

    # --- this peer's own ------------------------------------------------------------------------------

    def put_own_record(self, value: bytes, listed_under: Sequence[bytes]) -> None:
        """Hold this peer's own record, and list it, where it can be read from this node at once."""
        self._kademlia.put_own_record(record_key(self._host.peer), value)
        for key in listed_under:
            self._kademlia.provide_own(key, self._host.addresses.all())

    async def publish(self, value: bytes, listed_under: Sequence[bytes]) -> int:
        """Bring this peer's record and its entries to the nodes nearest to their keys that lack them.

        Returns how many nodes hold the record.
        """
        sequence = sequence_of(value)
        key = record_key(self._host.peer)
        for former in set(self._provided_at).difference(listed_under):
            del self._provided_at[former]
        holders = await self.lookups.put_value(key, value, lambda held: sequence_of(held) < sequence)
        for listing in listed_under:
            await self.lookups.provide(listing, self._provided_at.setdefault(listing, {}), PROVIDER_TTL / 3)
        return holders

    # --- what others say ------------------------------------------------------------------------------

    async def values(self, peer: PeerId, width: int) -> list[bytes]:
        """What ``width`` nodes have as the record of ``peer``; anything may be among it."""
        return await self.lookups.get_values(record_key(peer), width)

    async def listed(self, key: bytes) -> list[PeerId]:
        """Who is listed under ``key`` of an index."""
        return [PeerId(str(node)) for node in await self.lookups.get_providers(key)]

    async def _ping(self, node: ID) -> bool:
        own = self._host.libp2p.get_id().to_bytes()
        return await self.lookups.request(node, Message(type=Message.FIND_NODE, key=own)) is not None

    async def ping(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> bool:
        """Whether ``peer``, which announces ``addresses``, answers itself."""
        node = ID.from_string(peer)
        self._host.libp2p.get_peerstore().add_addrs(node, list(addresses), int(PROVIDER_TTL))
        return await self._ping(node)


async def _run_forever(task: Callable[[], Awaitable[None]]) -> None:
    """Run ``task``, which never ends by itself: what is raised here would end the whole transport."""
    while True:
        try:
            await task()
        except Exception:
            logger.exception("the upkeep of the DHT failed")
        await trio.sleep(_PAUSE_SECONDS)

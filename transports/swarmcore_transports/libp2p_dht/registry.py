"""The registry over libp2p's Kademlia DHT, for swarms in which not everybody can know everybody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random

from multiaddr import Multiaddr

from swarmcore.errors import InputError, PeerUnreachableError, SwarmError, UnavailableError
from swarmcore.pacing import jittered
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.registry.changes import ChangeReader
from swarmcore.registry.gossip.members import Members, group_by_peer
from swarmcore.registry.gossip.own_record import OwnRecord
from swarmcore.registry.gossip.records import (
    SignedRecord,
    without_load,
)
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Drop, RecordStore
from swarmcore.rpc import Node
from swarmcore.tasks import BackgroundTasks, wait_until_set
from swarmcore.types import Address, PeerId, ServerInfo, short
from swarmcore_transports.libp2p.multiaddrs import SCHEME, to_multiaddr
from swarmcore_transports.libp2p.transport import Libp2pTransport
from swarmcore_transports.libp2p.trio_thread import TrioThread
from swarmcore_transports.libp2p_dht.lookups import DhtOptions
from swarmcore_transports.libp2p_dht.node import DhtNode
from swarmcore_transports.libp2p_dht.reader import RecordReader
from swarmcore_transports.libp2p_dht.records import (
    ValueRules,
    directory_key,
    encode_value,
    key_listing,
)

logger = logging.getLogger(__name__)

_WITHDRAWAL_SECONDS = 3.0
_START_SECONDS = 30.0
_PUBLISH_SECONDS = 60.0
_LISTED_IN_DIRECTORY = 4  # servers of one model, those with the lowest ids: enough to find it by
_CONTEST_SECONDS = 1.0

_MAX_INTRODUCED = 16  # peers remembered

BootstrapPeer = tuple[PeerId, Sequence[Multiaddr]]
"""A peer and where it may be."""


def dht_registry(node: Node, bootstrap: Sequence[Address], *, member: bool) -> DhtRegistry:
    """The registry of ``node`` over the DHT of its libp2p transport; one that listens serves the DHT.

    Raise `InputError` when it has no such transport, and as `DhtRegistry` does.
    """
    for transport in node.transports:
        if isinstance(transport, Libp2pTransport):
            return DhtRegistry(node, transport, bootstrap)
    raise InputError(f"the registry dht needs the transport {SCHEME}: add it, or choose the registry gossip")


class DhtRegistry(Registry):
    """A node of the DHT on the host of ``transport``, one of those of ``node``.

    Each peer's record is stored under its own key, at the nodes nearest to that. Indices list who serves
    which part of which model, and a directory lists a few servers of every model. The view is put together
    from these in the background, every ``options.refresh`` seconds; what is stored at this node is seen at
    once. With ``models``, fingerprints, it holds the servers of these models only.

    ``node`` is neither started nor closed here; when it listens this peer serves the DHT, else it is a client
    of it. ``announce`` keeps the record fresh by itself (every third of its ttl) until `withdraw` or `close`.
    Raise `InputError` when all bootstrap addresses are those of other
    transports.
    """

    def __init__(
        self,
        node: Node,
        transport: Libp2pTransport,
        bootstrap: Sequence[Address] = (),
        *,
        models: Collection[str] | None = None,
        options: DhtOptions | None = None,
        rng: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        options = options or DhtOptions()
        usable = [address for address in bootstrap if address.scheme == SCHEME]
        if bootstrap and not usable:
            raise InputError(f"the registry dht is joined through a libp2p address, not {bootstrap[0]}")
        self.node = node
        self._transport = transport
        self._bootstrap = self._parse_peers(usable)
        self._introduced: deque[BootstrapPeer] = deque(maxlen=_MAX_INTRODUCED)
        self._models = models
        self._options = options
        self._rng = rng or Random()
        self._wall_clock = wall_clock
        self._rules = ValueRules(options.limits, node.allowed_peers)
        store = RecordStore(
            own=node.peer, limits=options.limits, capacity=options.capacity, allowed=node.allowed_peers
        )
        self._replica = Replica(store, Members(node.peer, (), self._rng), wall_clock)
        self._tasks = BackgroundTasks()
        self._own = OwnRecord(node.identity, self._replica, self._rng, self._issue)
        self._current: tuple[SignedRecord, list[bytes]] | None = None
        self._urgent = asyncio.Event()
        self._thread: TrioThread | None = None
        self._dht: DhtNode | None = None
        self._reader: RecordReader | None = None
        self._closed = False

    def __repr__(self) -> str:
        nodes = self._dht.nodes if self._dht else 0
        return f"<DhtRegistry {short(self.node.peer)} {self._replica.store!r} {nodes} nodes known>"

    @property
    def dropped(self) -> Mapping[Drop, int]:
        """Values refused so far, by reason, stored here by others or read elsewhere."""
        return self._rules.dropped

    async def start(self) -> None:
        """Join the DHT, put the first view together, and keep both up in the background.

        Raise `PeerUnreachableError`, naming what was tried, when no bootstrap peer answers, and `InputError`
        when this is a client that knows none.
        """
        if self._closed:
            raise UnavailableError("this registry is closed")
        if not self._bootstrap and not self._introduced and not self.node.addresses:
            raise InputError("a client needs the address of a member of the swarm to join through")
        if self._dht is None:
            thread, host = await self._transport.trio_side()
            serving = bool(self.node.addresses)
            dht = DhtNode(host, self._rules, self._options, serving=serving, on_record=self._stored_here)
            self._reader = RecordReader(
                self.node.peer,
                dht,
                thread,
                self._replica,
                self._rules,
                self._options,
                self._tasks,
                self._own_record_seen,
                models=self._models,
                rng=self._rng,
                wall_clock=self._wall_clock,
            )
            self._thread, self._dht = thread, dht
            thread.start_soon(dht.run)
        try:
            await self._join([*self._bootstrap, *self._introduced])
        except PeerUnreachableError as exc:
            if self._bootstrap or not self.node.addresses:
                raise
            logger.warning("a new swarm begins: %s", exc)
        assert self._reader
        await self._reader.refresh()
        self._tasks.start(self._follow(), "view of the DHT")
        self._tasks.start(self._publish_forever(), "own record in the DHT")

    async def _join(self, peers: Sequence[BootstrapPeer]) -> None:
        assert self._thread and self._dht
        await self._thread.call(self._dht.join, peers, timeout=_START_SECONDS, what="joining the DHT")

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._rules.allow_only(peers)
        self._replica.store.allow_only(peers)

    def introduce(self, addresses: Sequence[Address]) -> None:
        """Peers at ``addresses`` are met at the start, or at once after it, and whenever no node is left."""
        peers = self._parse_peers([address for address in addresses if address.scheme == SCHEME])
        self._introduced.extend(peers)
        if self._dht is not None and peers:
            self._tasks.start(self._join_again(peers), "introduction to the DHT")

    async def _join_again(self, peers: Sequence[BootstrapPeer]) -> None:
        try:
            await self._join(peers)
        except SwarmError as exc:
            logger.info("could not join the DHT again: %s", exc)

    def _parse_peers(self, addresses: Iterable[Address]) -> list[BootstrapPeer]:
        return [
            (member.peer, [to_multiaddr(address) for address in member.addresses])
            for member in group_by_peer(addresses)
            if member.peer != self.node.peer
        ]

    async def close(self) -> None:
        self._closed = True
        self._own.close()
        self._replica.close()
        await self._tasks.close()
        if self._thread and self._dht:
            self._thread.call_soon_trio(self._dht.stop)

    def view(self) -> SwarmView:
        return self._replica.store.view()

    def changes(self) -> ChangeReader:
        return self._replica.feed.reader()

    # --- this peer's own record -----------------------------------------------------------------------

    async def announce(self, info: ServerInfo, ttl: float) -> None:
        """Publish ``info`` and keep it fresh until it is replaced or withdrawn, or the registry is closed.

        Returns once it can be read from this node; the others get it in the background, news of nothing but
        this peer's load within ``options.upkeep`` seconds. Raise `InputError`
        when it may not be announced by this peer, or ``ttl`` or its size is over the limit, or this peer does
        not listen.
        """
        if self._closed:
            raise UnavailableError("this registry is closed")
        if not self.node.addresses:
            raise InputError("a peer that does not listen cannot be listed in the DHT")
        before = self._own.announced[0] if self._own.announced else None
        self._issue(info, ttl, urgent=before is None or without_load(before) != without_load(info))

    async def withdraw(self) -> None:
        """Take the announcement back, and wait up to three seconds until the nodes that hold it know."""
        if self._own.announced is None or self._current is None:
            return
        self._put_own_record(self._own.withdraw(), [])
        try:
            async with asyncio.timeout(_WITHDRAWAL_SECONDS):
                await self._publish()
        except TimeoutError:
            logger.debug("the withdrawal has not reached all nodes yet")

    def _issue(self, info: ServerInfo, ttl: float, *, urgent: bool = True) -> None:
        record, _ = self._own.issue(info, ttl)
        listings = [key_listing(info)]
        if self._in_directory(info):
            listings.append(directory_key())
        self._put_own_record(record, listings)
        if urgent:
            self._urgent.set()

    def _in_directory(self, info: ServerInfo) -> bool:
        """A model is found by a few of its servers: those that believe themselves to be the first by id."""
        if info.model is None:
            return False
        others = self.view().serving(info.model.fingerprint)
        return sum(other.peer < info.peer for other in others) < _LISTED_IN_DIRECTORY

    def _put_own_record(self, record: SignedRecord, listings: list[bytes]) -> None:
        self._current = (record, listings)
        if self._thread and self._dht:
            self._thread.call_soon_trio(self._dht.put_own_record, encode_value(record), listings)

    async def _publish_forever(self) -> None:
        while True:
            self._urgent.clear()
            await self._publish()
            await wait_until_set(self._urgent, jittered(self._options.upkeep, self._rng))

    async def _publish(self) -> None:
        if self._current is None:
            return
        assert self._thread and self._dht
        record, listings = self._current
        self._thread.call_soon_trio(self._dht.put_own_record, encode_value(record), listings)
        try:
            await self._thread.call(
                self._dht.publish,
                encode_value(record),
                listings,
                timeout=_PUBLISH_SECONDS,
                what="storing a record in the DHT",
            )
        except SwarmError as exc:
            logger.warning("the own record is not in the DHT yet: %s", exc)

    # --- the view -------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        assert self._reader
        while True:
            await asyncio.sleep(jittered(self._options.refresh, self._rng))
            self._reader.probe_hidden()
            if self._dht and not self._dht.nodes and (self._bootstrap or self._introduced):
                await self._join_again([*self._bootstrap, *self._introduced])
            try:
                await self._reader.refresh()
            except SwarmError as exc:
                logger.warning("could not read the indices of the DHT: %s", exc)

    def _stored_here(self, record: SignedRecord) -> None:
        """Called in the trio thread."""
        if self._thread:
            self._thread.call_soon_asyncio(self._take, record)

    def _take(self, record: SignedRecord) -> None:
        if self._reader and not self._closed:
            self._reader.take(record)

    def _own_record_seen(self, sequence: int) -> None:
        """Outdo a record of our own that we did not issue: from before a restart, or from another process."""
        if self._own.issued_elsewhere(sequence) and self._own.announced is not None:
            logger.warning(
                "another process announces itself as %s; give each its own identity", self.node.peer
            )
            self._own.refresh_in(_CONTEST_SECONDS)

    def suspect(self, peer: PeerId) -> None:
        if self._reader and not self._closed:
            self._reader.suspect(peer)

"""The registry over libp2p's Kademlia DHT, for swarms in which not everybody can know everybody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from typing import TypeVar

from multiaddr import Multiaddr

from swarmcore.errors import InputError, InternalError, PeerUnreachableError, SwarmError, UnavailableError
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.registry.changes import ChangeReader
from swarmcore.registry.clock import how_far_off
from swarmcore.registry.gossip.members import Members, group_by_peer
from swarmcore.registry.gossip.records import (
    Announcement,
    RecordIssuer,
    SignedRecord,
    decode_announcement,
    without_load,
)
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Accepted, Drop, RecordStore
from swarmcore.rpc import Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import Address, PeerId, ServerInfo, short
from swarmcore_transports.libp2p.multiaddrs import SCHEME, to_multiaddr
from swarmcore_transports.libp2p.transport import Libp2pTransport
from swarmcore_transports.libp2p.trio_thread import TrioThread
from swarmcore_transports.libp2p_dht.node import Dht
from swarmcore_transports.libp2p_dht.options import DhtOptions
from swarmcore_transports.libp2p_dht.records import (
    RefusedValue,
    ValueRules,
    directory_key,
    encode_value,
    key_listing,
    range_keys,
    record_key,
    sequence_of,
)

logger = logging.getLogger(__name__)

_WITHDRAWAL_PATIENCE = 3.0
_START_SECONDS = 30.0
_PUBLISH_SECONDS = 60.0
_IN_DIRECTORY = 4  # servers of one model, those with the lowest ids: enough to find it by
_MODELS = 256  # followed at most where all are
_PROBES = 16  # at a time about peers found dead
_CONTEST_PAUSE = 1.0

_INTRODUCED = 16  # peers remembered

Entrance = tuple[PeerId, Sequence[Multiaddr]]
"""A peer and where it may be."""

K = TypeVar("K")
T = TypeVar("T")


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
        self._bootstrap = self._entrances(usable)
        self._introduced: deque[Entrance] = deque(maxlen=_INTRODUCED)
        self._models = None if models is None else frozenset(models)
        self._options = options
        self._rng = rng or Random()
        self._wall_clock = wall_clock
        self._issuer = RecordIssuer(node.identity, wall_clock, options.limits)
        self._rules = ValueRules(options.limits, node.allowed_peers)
        store = RecordStore(
            own=node.peer, limits=options.limits, capacity=options.capacity, allowed=node.allowed_peers
        )
        self._replica = Replica(store, Members(node.peer, (), self._rng), wall_clock)
        self._tasks = BackgroundTasks()
        self._lookups = asyncio.Semaphore(options.lookups)
        self._read_again: dict[PeerId, float] = {}
        self._suspected: set[PeerId] = set()
        self._newest_refused: float | None = None
        self._clock_warned = False
        self._announced: tuple[ServerInfo, float] | None = None
        self._current: tuple[SignedRecord, list[bytes]] | None = None
        self._refresh: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._thread: TrioThread | None = None
        self._dht: Dht | None = None
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
            dht = Dht(host, self._rules, self._options, serving=serving, heard=self._stored_here)
            self._thread, self._dht = thread, dht
            thread.start_soon(dht.run)
        try:
            await self._join([*self._bootstrap, *self._introduced])
        except PeerUnreachableError as exc:
            if self._bootstrap or not self.node.addresses:
                raise
            logger.warning("a new swarm begins: %s", exc)
        await self._look_around()
        self._tasks.start(self._follow(), "view of the DHT")
        self._tasks.start(self._publish_forever(), "own record in the DHT")

    async def _join(self, entrances: Sequence[Entrance]) -> None:
        assert self._thread and self._dht
        await self._thread.call(self._dht.join, entrances, timeout=_START_SECONDS, what="joining the DHT")

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._rules.allow_only(peers)
        self._replica.store.allow_only(peers)

    def introduce(self, addresses: Sequence[Address]) -> None:
        """Peers at ``addresses`` are met at the start, or at once after it, and whenever no node is left."""
        entrances = self._entrances([address for address in addresses if address.scheme == SCHEME])
        self._introduced.extend(entrances)
        if self._dht is not None and entrances:
            self._tasks.start(self._join_again(entrances), "introduction to the DHT")

    async def _join_again(self, entrances: Sequence[Entrance]) -> None:
        try:
            await self._join(entrances)
        except SwarmError as exc:
            logger.info("could not join the DHT again: %s", exc)

    def _entrances(self, addresses: Iterable[Address]) -> list[Entrance]:
        return [
            (member.peer, [to_multiaddr(address) for address in member.addresses])
            for member in group_by_peer(addresses)
            if member.peer != self.node.peer
        ]

    async def close(self) -> None:
        self._closed = True
        if self._refresh is not None:
            self._refresh.cancel()
        self._replica.close()
        await self._tasks.close()
        if self._thread and self._dht:
            self._thread.post(self._dht.stop)

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
        before = self._announced[0] if self._announced else None
        self._issue(info, ttl, urgent=before is None or without_load(before) != without_load(info))

    async def withdraw(self) -> None:
        """Take the announcement back, and wait up to three seconds until the nodes that hold it know."""
        if self._announced is None or self._current is None:
            return
        self._announced = None
        if self._refresh is not None:
            self._refresh.cancel()
        withdrawal = self._issuer.withdraw()
        self._replica.apply(withdrawal)
        self._keep(withdrawal, [])
        try:
            async with asyncio.timeout(_WITHDRAWAL_PATIENCE):
                await self._publish()
        except TimeoutError:
            logger.debug("the withdrawal has not reached all nodes yet")

    def _issue(self, info: ServerInfo, ttl: float, *, urgent: bool = True) -> None:
        record = self._issuer.announce(info, ttl)
        self._announced = (info, ttl)
        outcome = self._replica.apply(record)
        if outcome is Drop.REPLAYED:  # the clock was set back
            self._replica.store.forget_sequence(self.node.peer)
            outcome = self._replica.apply(record)
        if isinstance(outcome, Drop):
            raise InternalError(f"this peer dropped its own record as {outcome}")
        listings = [key_listing(info)]
        if self._in_directory(info):
            listings.append(directory_key())
        self._keep(record, listings)
        if urgent:
            self._news.set()
        if self._refresh is not None:
            self._refresh.cancel()
        if not self._closed:
            loop = asyncio.get_running_loop()
            self._refresh = loop.call_later(ttl / 3 * self._rng.uniform(0.9, 1.0), self._issue, info, ttl)

    def _in_directory(self, info: ServerInfo) -> bool:
        """A model is found by a few of its servers: those that believe themselves to be the first by id."""
        if info.model is None:
            return False
        others = self.view().serving(info.model.fingerprint)
        return sum(other.peer < info.peer for other in others) < _IN_DIRECTORY

    def _keep(self, record: SignedRecord, listings: list[bytes]) -> None:
        self._current = (record, listings)
        if self._thread and self._dht:
            self._thread.post(self._dht.keep, encode_value(record), listings)

    async def _publish_forever(self) -> None:
        while True:
            self._news.clear()
            await self._publish()
            try:
                async with asyncio.timeout(self._options.upkeep * self._rng.uniform(0.75, 1.25)):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _publish(self) -> None:
        if self._current is None:
            return
        assert self._thread and self._dht
        record, listings = self._current
        self._thread.post(self._dht.keep, encode_value(record), listings)
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
        while True:
            await asyncio.sleep(self._options.refresh * self._rng.uniform(0.75, 1.25))
            self._probe_hidden()
            if self._dht and not self._dht.nodes and (self._bootstrap or self._introduced):
                await self._join_again([*self._bootstrap, *self._introduced])
            try:
                await self._look_around()
            except SwarmError as exc:
                logger.warning("could not look around in the DHT: %s", exc)

    async def _look_around(self) -> None:
        """Read the indices of the models followed, and the records of those they list."""
        models = self._models
        if models is None:
            await self._read_all(await self._listed([directory_key()]))
            models = frozenset(["", *sorted(self.view().models())[:_MODELS]])
        listed = await self._listed([key for model in sorted(models) for key in range_keys(model)])
        await self._read_all(listed | set(self.view().servers))
        self._check_clock()

    def _check_clock(self) -> None:
        """Nodes keep records for as long as these hold: when none of those that they have does, it is this
        machine's clock."""
        newest, self._newest_refused = self._newest_refused, None
        others = [server for server in self.view() if server.peer != self.node.peer]
        if newest is not None and not others and not self._clock_warned:
            self._clock_warned = True
            logger.warning(
                "nothing that is stored in the DHT holds by this machine's clock, which is about %s that of "
                "the peer that announced itself last: set the clock",
                how_far_off(self._wall_clock() - newest),
            )

    async def _listed(self, keys: Iterable[bytes]) -> set[PeerId]:
        """Who is listed under any of ``keys``."""
        assert self._dht
        dht = self._dht
        found = await asyncio.gather(*(self._look_up(dht.listed, key) for key in keys))
        return {peer for peers in found for peer in peers or ()}

    async def _read_all(self, peers: Iterable[PeerId]) -> None:
        """Read the records of ``peers``, but for those read lately."""
        now = asyncio.get_running_loop().time()
        self._read_again = {peer: due for peer, due in self._read_again.items() if due > now}
        due = [peer for peer in peers if peer not in self._read_again and peer != self.node.peer]
        self._rng.shuffle(due)
        await asyncio.gather(*(self._read(peer) for peer in due[: self._options.capacity]))

    async def _read(self, peer: PeerId) -> None:
        """Take what is stored of ``peer``; of one that is known, from one node if that has news."""
        assert self._dht
        known = self._replica.store.sequence(peer)
        if known is not None:
            self._take_values(peer, await self._look_up(self._dht.glance, peer))
        if known is None or known == self._replica.store.sequence(peer):
            self._take_values(peer, await self._look_up(self._dht.values, peer))

    def _take_values(self, peer: PeerId, values: list[bytes] | None) -> None:
        for value in set(values or ()):
            try:
                record = self._rules.check(record_key(peer), value, self._wall_clock())
            except RefusedValue as refused:
                logger.debug("a record of %s: %s", short(peer), refused)
                if refused.drop in (Drop.EXPIRED, Drop.SKEWED):
                    self._newest_refused = max(self._newest_refused or 0.0, sequence_of(value) / 1000)
            else:
                self._take(record)

    async def _look_up(self, look_up: Callable[[K], Awaitable[T]], key: K) -> T | None:
        assert self._thread
        async with self._lookups:
            try:
                return await self._thread.call(
                    look_up, key, timeout=2 * self._options.lookup_timeout, what="a look-up in the DHT"
                )
            except SwarmError as exc:
                logger.debug("a look-up in the DHT failed: %s", exc)
                return None

    def _stored_here(self, record: SignedRecord) -> None:
        """Called in the trio thread."""
        if self._thread:
            self._thread.tell(self._take, record)

    def _take(self, record: SignedRecord) -> None:
        said = decode_announcement(record)
        if self._closed or not self._concerns(said):
            return
        if said.peer == self.node.peer and said.sequence > self._issuer.last_sequence:
            self._supersede(said.sequence)
        outcome = self._replica.apply(record)
        if isinstance(outcome, Accepted) or outcome is Drop.KNOWN:
            again = min(self._options.reread, said.ttl / 3)
            self._read_again[said.peer] = asyncio.get_running_loop().time() + again

    def _concerns(self, said: Announcement) -> bool:
        if self._models is None or said.peer in self.view().servers or said.info is None:
            return True
        return said.info.model is not None and said.info.model.fingerprint in self._models

    def _supersede(self, sequence: int) -> None:
        """A record of our own that we did not issue: from before a restart, or from another process."""
        self._issuer.supersede(sequence)
        if self._announced is not None:
            logger.warning(
                "another process announces itself as %s; give each its own identity", self.node.peer
            )
            if self._refresh is not None:
                self._refresh.cancel()
            loop = asyncio.get_running_loop()
            self._refresh = loop.call_later(_CONTEST_PAUSE, self._issue, *self._announced)

    # --- peers that do not answer ---------------------------------------------------------------------

    def suspect(self, peer: PeerId) -> None:
        """Ask ``peer`` whether it lives. If not, hide it here, until it is read to have announced again."""
        if self._closed or self._dht is None or peer == self.node.peer or peer in self._suspected:
            return
        if (info := self._replica.store.info(peer)) is not None:
            self._suspected.add(peer)
            self._tasks.start(self._probe(info), f"probe of {short(peer)}")

    async def _probe(self, info: ServerInfo) -> None:
        try:
            sequence = self._replica.store.sequence(info.peer)
            if await self._answers(info):
                self._replica.unhide(info.peer)
            elif sequence is not None:
                self._replica.hide(info.peer, sequence)
            await self._read(info.peer)
        finally:
            self._suspected.discard(info.peer)

    async def _answers(self, info: ServerInfo) -> bool:
        assert self._thread and self._dht
        parsed = [Address.parse(url) for url in info.addresses]
        places = [to_multiaddr(address) for address in parsed if address.scheme == SCHEME]
        try:
            return await self._thread.call(
                self._dht.answers, info.peer, places, timeout=2 * self._options.timeout, what="a probe"
            )
        except SwarmError:
            return False

    def _probe_hidden(self) -> None:
        hidden = [said.info for said in self._replica.store.hidden() if said.info is not None]
        for info in hidden[:_PROBES]:
            if info.peer not in self._suspected:
                self._suspected.add(info.peer)
                self._tasks.start(self._probe(info), f"probe of {short(info.peer)}")

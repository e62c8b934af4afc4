"""What a registry over the DHT reads of others: indices, records, and whether suspected peers live."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from random import Random
from typing import TypeVar, TypeVarTuple

from swarmcore.errors import SwarmError
from swarmcore.registry.clock import how_far_off
from swarmcore.registry.gossip.records import Announcement, SignedRecord, decode_announcement
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Accepted, Drop
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import PeerId, ServerInfo, short
from swarmcore_transports.libp2p.multiaddrs import SCHEME, to_multiaddr
from swarmcore_transports.libp2p.trio_thread import TrioThread
from swarmcore_transports.libp2p_dht.lookups import DhtOptions
from swarmcore_transports.libp2p_dht.node import DhtNode
from swarmcore_transports.libp2p_dht.records import (
    RefusedValue,
    ValueRules,
    directory_key,
    range_keys,
    record_key,
    sequence_of,
)

logger = logging.getLogger(__name__)

_MAX_MODELS = 256  # followed where all are
_MAX_HIDDEN_PROBED = 16  # at a time, of the peers found dead

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class RecordReader:
    """Keeps ``replica`` up to date with what the DHT holds, for ``models`` or, without them, for all.

    ``on_own`` is called with the sequence number of a record of this peer, ``own``, that was stored by
    somebody. Lives in asyncio; ``thread`` is where ``node`` runs.
    """

    def __init__(
        self,
        own: PeerId,
        node: DhtNode,
        thread: TrioThread,
        replica: Replica,
        rules: ValueRules,
        options: DhtOptions,
        tasks: BackgroundTasks,
        on_own: Callable[[int], None],
        *,
        models: Collection[str] | None,
        rng: Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._own = own
        self._node = node
        self._thread = thread
        self._replica = replica
        self._rules = rules
        self._options = options
        self._tasks = tasks
        self._on_own = on_own
        self._models = None if models is None else frozenset(models)
        self._rng = rng
        self._wall_clock = wall_clock
        self._lookups = asyncio.Semaphore(options.lookups)
        self._read_again_at: dict[PeerId, float] = {}
        self._probing: set[PeerId] = set()
        self._newest_refused: float | None = None
        self._clock_warned = False

    async def refresh(self) -> None:
        """Read the indices of the models followed, and the records of those they list."""
        models = self._models
        if models is None:
            await self._read_all(await self._listed([directory_key()]))
            models = frozenset(["", *sorted(self._replica.store.view().models())[:_MAX_MODELS]])
        listed = await self._listed([key for model in sorted(models) for key in range_keys(model)])
        await self._read_all(listed | set(self._replica.store.view().servers))
        self._check_clock()

    def _check_clock(self) -> None:
        """Nodes keep records for as long as these hold: when none of those that they have does, it is this
        machine's clock."""
        newest, self._newest_refused = self._newest_refused, None
        others = [server for server in self._replica.store.view() if server.peer != self._own]
        if newest is not None and not others and not self._clock_warned:
            self._clock_warned = True
            logger.warning(
                "nothing that is stored in the DHT holds by this machine's clock, which is about %s that of "
                "the peer that announced itself last: set the clock",
                how_far_off(self._wall_clock() - newest),
            )

    async def _listed(self, keys: Iterable[bytes]) -> set[PeerId]:
        """Who is listed under any of ``keys``."""
        found = await asyncio.gather(*(self._look_up(self._node.listed, key) for key in keys))
        return {peer for peers in found for peer in peers or ()}

    async def _read_all(self, peers: Iterable[PeerId]) -> None:
        """Read the records of ``peers``, but for those read lately."""
        now = asyncio.get_running_loop().time()
        self._read_again_at = {peer: due for peer, due in self._read_again_at.items() if due > now}
        due = [peer for peer in peers if peer not in self._read_again_at and peer != self._own]
        self._rng.shuffle(due)
        await asyncio.gather(*(self._read(peer) for peer in due[: self._options.capacity]))

    async def _read(self, peer: PeerId) -> None:
        """Take what is stored of ``peer``; of one that is known, from one node if that has news."""
        known = self._replica.store.sequence(peer)
        if known is not None:
            self._take_values(peer, await self._look_up(self._node.values, peer, 1))
        if known is None or known == self._replica.store.sequence(peer):
            self._take_values(peer, await self._look_up(self._node.values, peer, self._options.read_width))

    def _take_values(self, peer: PeerId, values: list[bytes] | None) -> None:
        for value in set(values or ()):
            try:
                record = self._rules.check(record_key(peer), value, self._wall_clock())
            except RefusedValue as refused:
                logger.debug("a record of %s: %s", short(peer), refused)
                if refused.drop in (Drop.EXPIRED, Drop.SKEWED):
                    self._newest_refused = max(self._newest_refused or 0.0, sequence_of(value) / 1000)
            else:
                self.take(record)

    async def _look_up(self, look_up: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T | None:
        async with self._lookups:
            try:
                return await self._thread.call(
                    look_up,
                    *arguments,
                    timeout=2 * self._options.lookup_timeout,
                    what="a look-up in the DHT",
                )
            except SwarmError as exc:
                logger.debug("a look-up in the DHT failed: %s", exc)
                return None

    def take(self, record: SignedRecord) -> None:
        """Take a record that is sound into the view, if it is of a model that is followed."""
        announcement = decode_announcement(record)
        if not self._concerns(announcement):
            return
        if announcement.peer == self._own:
            self._on_own(announcement.sequence)
        outcome = self._replica.apply(record)
        if isinstance(outcome, Accepted) or outcome is Drop.KNOWN:
            pause = min(self._options.reread, announcement.ttl / 3)
            self._read_again_at[announcement.peer] = asyncio.get_running_loop().time() + pause

    def _concerns(self, announcement: Announcement) -> bool:
        info = announcement.info
        if self._models is None or announcement.peer in self._replica.store.view().servers or info is None:
            return True
        return info.model is not None and info.model.fingerprint in self._models

    # --- peers that do not answer ---------------------------------------------------------------------

    def suspect(self, peer: PeerId) -> None:
        """Ask ``peer`` whether it lives. If not, hide it here, until it is read to have announced again."""
        info = self._replica.store.info(peer)
        if info is not None and peer != self._own:
            self._start_probe(info)

    def probe_hidden(self) -> None:
        """Ask those that are hidden whether they live again."""
        hidden = [hidden.info for hidden in self._replica.store.hidden() if hidden.info is not None]
        for info in hidden[:_MAX_HIDDEN_PROBED]:
            self._start_probe(info)

    def _start_probe(self, info: ServerInfo) -> None:
        if info.peer not in self._probing:
            self._probing.add(info.peer)
            self._tasks.start(self._probe(info), f"probe of {short(info.peer)}")

    async def _probe(self, info: ServerInfo) -> None:
        try:
            sequence = self._replica.store.sequence(info.peer)
            if await self._answers(info):
                self._replica.unhide(info.peer)
            elif sequence is not None:
                self._replica.hide(info.peer, sequence)
            await self._read(info.peer)
        finally:
            self._probing.discard(info.peer)

    async def _answers(self, info: ServerInfo) -> bool:
        places = [to_multiaddr(address) for address in info.dialable if address.scheme == SCHEME]
        try:
            return await self._thread.call(
                self._node.ping, info.peer, places, timeout=2 * self._options.timeout, what="a probe"
            )
        except SwarmError:
            return False

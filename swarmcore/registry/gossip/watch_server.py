"""The serving side of the watch protocol: peers that only read are sent what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarmcore.errors import TooManyCallsError, UnavailableError
from swarmcore.registry.gossip.digest import Key, key_of, pack_entries
from swarmcore.registry.gossip.messages import RecordBatch, WatchRecords, records_per_message
from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.store import Accepted, RecordStore
from swarmcore.resources import Priority, Resource, ResourceManager
from swarmcore.rpc import Channel
from swarmcore.tasks import deadline_after, wait_until_set
from swarmcore.types import PeerId
from swarmcore.wire.limits import Limits

MAX_WATCHERS = 1024
MAX_OF_PEER = 8
"""WatchServer of one peer among them: each costs a list of all records at its beginning."""
KEEPALIVE = 5.0
"""Seconds of silence after which a watcher is sent an empty batch."""
STALL = 30.0
"""Seconds that a watcher may take to accept a batch."""
_WAITING_NBYTES = 128
"""Memory for one record that waits for a watcher, beside the record itself, which the store holds."""
SHORT_TTL = 12 * KEEPALIVE
"""Records of a longer ttl that change nothing but their expiry wait for the next keep-alive."""


class WatchServer:
    """Sends every record that is given to `offer`, and every suspicion, to all watchers.

    Records for a slow watcher wait, only the newest of each peer: what waits is bounded by the store's
    capacity, and counted for the watcher's peer in ``resources``. A watcher that accepts nothing for `STALL`
    seconds is dropped.
    """

    def __init__(
        self,
        store: RecordStore,
        limits: Limits,
        wall_clock: Callable[[], float],
        resources: ResourceManager,
    ) -> None:
        self._store = store
        self._resources = resources
        self._wall_clock = wall_clock
        self._batch = records_per_message(limits, store.limits)
        self._watchers: dict[_Watcher, None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    def offer(self, record: SignedRecord, accepted: Accepted) -> None:
        announcement = accepted.announcement
        urgent = accepted.change is not None or announcement.ttl < SHORT_TTL
        for watcher in self._watchers:
            watcher.waiting[announcement.peer] = record
            if urgent:
                watcher.wake.set()

    def suspect(self, peer: PeerId, sequence: int) -> None:
        """Tell all watchers that ``peer``, whose record has that number, may be dead."""
        for watcher in self._watchers:
            watcher.suspected[key_of(peer)] = sequence
            watcher.wake.set()

    async def serve(self, channel: Channel) -> None:
        """Handle one channel of the watch protocol, until the other side is gone or `close` is called.

        Raise `TooManyCallsError` above `MAX_WATCHERS`, or `MAX_OF_PEER` of one peer, `ProtocolError` for a
        malformed digest, and `ResourceLimitError` when there is no room for what the peer does not read.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise TooManyCallsError(f"this peer has {MAX_WATCHERS} watchers, its limit; watch another one")
        if sum(watcher.peer == channel.remote for watcher in self._watchers) >= MAX_OF_PEER:
            raise TooManyCallsError(f"you have {MAX_OF_PEER} watchers here, the limit of one peer")
        opening: WatchRecords = channel.opening.record
        buckets = self._store.differing(opening.hashes)
        watcher = _Watcher(
            channel.remote, self._store.current_in(buckets), dict(self._store.hidden_entries())
        )
        self._watchers[watcher] = None
        try:
            while not self._closed:
                batch = watcher.take(self._batch, self._wall_clock())
                nbytes = sum(record.nbytes for record in batch.records)
                nbytes += _WAITING_NBYTES * len(watcher.waiting)
                with self._resources.reserve(watcher.peer, Resource.BYTES, nbytes, priority=Priority.MEDIUM):
                    async with deadline_after(STALL, f"a watcher took nothing for {STALL:g} s"):
                        await channel.send(batch)
                if batch.complete:
                    await wait_until_set(watcher.wake, KEEPALIVE)
        finally:
            del self._watchers[watcher]
        raise UnavailableError("this peer is leaving; watch another one")

    def close(self) -> None:
        """Send all watchers elsewhere."""
        self._closed = True
        for watcher in self._watchers:
            watcher.wake.set()


class _Watcher:
    def __init__(self, peer: PeerId, waiting: dict[PeerId, SignedRecord], suspected: dict[Key, int]) -> None:
        self.peer = peer
        self.waiting = waiting
        self.suspected = suspected
        self.wake = asyncio.Event()

    def take(self, count: int, clock: float) -> RecordBatch:
        self.wake.clear()
        records = tuple(self.waiting.pop(owner) for owner in list(self.waiting)[:count])
        complete = not self.waiting
        suspected = b""
        if complete:  # a suspicion is of use to those only who have the record
            suspected = pack_entries(self.suspected.items())
            self.suspected.clear()
        return RecordBatch(records, complete, suspected, clock)

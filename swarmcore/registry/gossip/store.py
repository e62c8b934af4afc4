"""The set of records a peer holds: who is live, what is dropped and why, when each record expires."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from enum import StrEnum
from types import MappingProxyType

import attrs

from swarmcore.errors import ProtocolError
from swarmcore.registry.base import Change, SwarmView
from swarmcore.registry.gossip.digest import Digest, Key, key_of
from swarmcore.registry.gossip.options import CAPACITY
from swarmcore.registry.gossip.records import (
    Announcement,
    RecordLimits,
    SignedRecord,
    decode_announcement,
    is_signed_by,
    may_announce,
)
from swarmcore.types import PeerId, ServerInfo


class Drop(StrEnum):
    """Why a record was not taken."""

    KNOWN = "known"
    """It is held already: gossip brings each record by several ways. No sign of trouble."""
    REPLAYED = "replayed"
    """A record of this peer as new or newer was seen before."""
    EXPIRED = "expired"
    FORGED = "forged"
    """The signature is not the owner's."""
    MALFORMED = "malformed"
    """Not a record, or it announces what no peer may (see `check_info`)."""
    OVERSIZED = "oversized"
    SKEWED = "skewed"
    """Issued further in the future than clocks may differ, or with too long a ttl."""
    UNLISTED = "unlisted"
    """The swarm is closed and this peer is not of it."""
    FULL = "full"
    """There is no room for another peer."""


@attrs.frozen
class Accepted:
    """A record that was taken."""

    announcement: Announcement
    change: Change | None
    """What is different now; None when the record only prolongs what was known."""
    doubtful: bool = False
    """Its owner was found dead after it was issued, and stays hidden until it is seen to be alive."""


@attrs.define
class _Entry:
    """The latest record of one peer, kept past its end for as long as older ones could be replayed."""

    record: SignedRecord
    announcement: Announcement
    expires: float
    forget: float
    """From here on this record and those before it are refused as expired: no need to remember its number.
    (Not those that the owner issued earlier for longer: it should not shorten its ttl.)"""
    current: bool = True
    """Passed on to others: neither expired nor forgotten. A withdrawal is current until it is forgotten."""
    scheduled: float = 0.0
    """Its place in the queue of what is due, which may be too early: a prolonged entry is put back then."""

    @property
    def due(self) -> float:
        return self.expires if self.current else self.forget


class RecordStore:
    """The newest record of every peer, up to ``capacity`` peers.

    A plain object: ``now`` is always passed in, in seconds since the epoch. When the store is full, records
    of peers not yet known are dropped: who is known stays, however many identities someone makes up. Only
    ``own`` is always let in. ``allowed`` are the peers of a closed swarm; None admits everyone.
    """

    def __init__(
        self,
        *,
        own: PeerId | None = None,
        limits: RecordLimits | None = None,
        capacity: int = CAPACITY,
        allowed: Collection[PeerId] | None = None,
    ) -> None:
        self.dropped: Counter[Drop] = Counter()
        """How many records were dropped, by reason."""
        self._own = own
        self.limits = limits or RecordLimits()
        self._capacity = capacity
        self._allowed = None if allowed is None else frozenset(allowed)
        self._entries: dict[Key, _Entry] = {}
        self._digest = Digest()
        self._due: list[tuple[float, Key]] = []
        self._servers: dict[PeerId, ServerInfo] = {}
        self._hidden: dict[Key, float] = {}  # since when those found dead are
        self._revision = 0
        self._view: SwarmView | None = None

    def __repr__(self) -> str:
        drops = "".join(f" · {count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"<RecordStore {len(self._servers)} live · {len(self._entries)}/{self._capacity} held{drops}>"

    def __len__(self) -> int:
        """Peers that take up room: the live ones, and those lately gone."""
        return len(self._entries)

    def apply(self, record: SignedRecord, now: float) -> Accepted | Drop:
        """Take ``record`` if it is sound and news; else count and return why not."""
        outcome = self._judge(record, now)
        if isinstance(outcome, Drop):
            self.dropped[outcome] += 1
            return outcome
        return self._take(record, outcome, now)

    def expire(self, now: float) -> list[Change]:
        """Let go of what has expired by ``now``; return who left."""
        changes = []
        while self._due and self._due[0][0] <= now:
            when, key = heapq.heappop(self._due)
            entry = self._entries.get(key)
            if entry is None or entry.scheduled != when:
                continue  # left over from a longer ttl
            if entry.due > now:  # prolonged since
                self._schedule(key, entry)
                continue
            if entry.current and entry.forget > now:
                entry.current = False
                self._schedule(key, entry)
            else:
                del self._entries[key]
            self._digest.discard(key)
            self._hidden.pop(key, None)
            if change := self._show(entry.announcement.peer, None):
                changes.append(change)
        return changes

    def next_due(self) -> float | None:
        """When `expire` has something to do next."""
        return self._due[0][0] if self._due else None

    def view(self) -> SwarmView:
        """The live servers. Copied only after a change."""
        if self._view is None:
            self._view = SwarmView(MappingProxyType(self._servers.copy()), self._revision)
        return self._view

    def current(self, keys: Iterable[Key] | None = None) -> Iterator[SignedRecord]:
        """The records to pass on, withdrawals included: all, or those of ``keys`` that are held."""
        entries = self._entries.values() if keys is None else map(self._entries.get, keys)
        return (entry.record for entry in entries if entry is not None and entry.current)

    def current_in(self, buckets: Collection[int]) -> dict[PeerId, SignedRecord]:
        """The records to pass on whose owners fall into ``buckets``."""
        return {
            entry.announcement.peer: entry.record
            for key, entry in self._entries.items()
            if key[0] in buckets and entry.current
        }

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Take records of ``peers`` alone from now on; those of others that are here last to their end."""
        self._allowed = frozenset(peers)

    def forget_sequence(self, peer: PeerId) -> None:
        """Let the next record of ``peer`` be taken whatever its sequence number.

        For an owner whose clock was set back, about its own records only.
        """
        key = key_of(peer)
        if self._entries.pop(key, None) is not None:
            self._digest.discard(key)
            self._hidden.pop(key, None)

    # --- peers found dead -----------------------------------------------------------------------------

    def sequence(self, peer: PeerId) -> int | None:
        """Number of the record of a peer that is in the view; None when it is not."""
        return self._entries[key_of(peer)].announcement.sequence if peer in self._servers else None

    def info(self, peer: PeerId) -> ServerInfo | None:
        """What a peer of the view announces."""
        return self._servers.get(peer)

    def hide(self, peer: PeerId, sequence: int, now: float, *, issued_before: float = 0.0) -> Change | None:
        """Take ``peer`` out of the view if its record has number ``sequence`` at most.

        One that was ``issued_before`` it was found dead is hidden as well. The record is kept and passed on
        as before. One that was issued after ``now`` brings the peer back; news from before that may still
        be on its way, and does not.
        """
        held = self.sequence(peer)
        if held is None or held > max(sequence, issued_before * 1000) or peer == self._own:
            return None
        key = key_of(peer)
        self._hidden[key] = now
        return self._show(peer, None)

    def unhide(self, peer: PeerId) -> Change | None:
        """Show a hidden peer again: it has answered after all."""
        key = key_of(peer)
        if key not in self._hidden:
            return None
        self._hidden.pop(key, None)
        return self._show(peer, self._entries[key].announcement.info)

    def hidden(self) -> Iterator[Announcement]:
        """What those that are hidden have announced."""
        return (self._entries[key].announcement for key in self._hidden)

    def hidden_entries(self) -> list[tuple[Key, int]]:
        """Key and sequence number of the hidden records."""
        return [(key, self._entries[key].announcement.sequence) for key in self._hidden]

    def hidden_sequence(self, peer: PeerId) -> int:
        """Number of the record of ``peer`` if it is hidden; else 0."""
        key = key_of(peer)
        return self._entries[key].announcement.sequence if key in self._hidden else 0

    def shown_among(self, entries: Iterable[tuple[Key, int]]) -> list[tuple[PeerId, int]]:
        """Those peers of the view whose records have the keys ``entries`` and their numbers or lower."""
        found = []
        for key, sequence in entries:
            entry = self._entries.get(key)
            if key not in self._hidden and entry is not None and entry.announcement.sequence <= sequence:
                peer = entry.announcement.peer
                if peer in self._servers:
                    found.append((peer, sequence))
        return found

    # --- differences with another store ---------------------------------------------------------------

    def hashes(self) -> bytes:
        """This store's digest: see `swarmcore.registry.gossip.digest`."""
        return self._digest.hashes()

    def differing(self, hashes: bytes) -> set[int]:
        """The buckets in which another store's digest differs. Raise `ProtocolError` for a bad digest."""
        return set(self._digest.differing(hashes))

    def entries(self, buckets: Collection[int]) -> Iterator[tuple[Key, int]]:
        """Key and sequence number of all that is held in ``buckets``.

        Records that have expired here are listed, too, so that nobody offers them again.
        """
        return (
            (key, entry.announcement.sequence) for key, entry in self._entries.items() if key[0] in buckets
        )

    def compare(
        self, buckets: Collection[int], theirs: Iterable[tuple[Key, int]]
    ) -> tuple[list[Key], list[Key]]:
        """From another store's `entries` in ``buckets``: the keys to ask it for, and those to offer it."""
        wanted: list[Key] = []
        held = dict(theirs)
        for key, sequence in held.items():
            entry = self._entries.get(key)
            room = len(self._entries) + len(wanted) < self._capacity
            if (entry is None and room) or (entry is not None and entry.announcement.sequence < sequence):
                wanted.append(key)
        offered = [
            key
            for key, entry in self._entries.items()
            if key[0] in buckets and entry.current and held.get(key, -1) < entry.announcement.sequence
        ]
        return wanted, offered

    # --- one record -----------------------------------------------------------------------------------

    def _judge(self, record: SignedRecord, now: float) -> Announcement | Drop:
        # Cheapest checks first: a signature takes a tenth of a millisecond, and most records are repeats.
        if len(record.payload) > self.limits.max_bytes:
            return Drop.OVERSIZED
        try:
            new = decode_announcement(record)
        except ProtocolError:
            return Drop.MALFORMED
        if self._allowed is not None and new.peer not in self._allowed and new.peer != self._own:
            return Drop.UNLISTED
        if new.issued > now + self.limits.max_skew or new.ttl > self.limits.max_ttl:
            return Drop.SKEWED
        if now >= self._last_moment(new):
            return Drop.EXPIRED
        held = self._entries.get(key_of(new.peer))
        if held is not None:
            if held.current and held.record == record:
                return Drop.KNOWN
            if new.sequence <= held.announcement.sequence:
                return Drop.REPLAYED
        elif len(self._entries) >= self._capacity and new.peer != self._own:
            return Drop.FULL
        if not may_announce(record):
            return Drop.MALFORMED
        return new if is_signed_by(record, new.peer) else Drop.FORGED

    def _last_moment(self, announcement: Announcement) -> float:
        return announcement.issued + announcement.ttl + self.limits.max_skew

    def _take(self, record: SignedRecord, new: Announcement, now: float) -> Accepted:
        key = key_of(new.peer)
        held = self._entries.get(key)
        forget = max(self._last_moment(new), held.forget if held else 0.0)
        # A ttl runs from receipt, so that an owner whose clock is behind is not dead on arrival; but never
        # past what its signature grants, so that passing a record around does not prolong it.
        expires = forget if new.info is None else min(now + new.ttl, self._last_moment(new))
        entry = self._entries[key] = _Entry(record, new, expires, forget)
        if held is None or entry.due < held.scheduled:
            self._schedule(key, entry)
        else:
            entry.scheduled = held.scheduled
        self._digest.put(key, new.sequence)
        if new.info is not None and new.issued <= self._hidden.get(key, 0.0):
            return Accepted(new, None, doubtful=True)
        self._hidden.pop(key, None)
        return Accepted(new, self._show(new.peer, new.info))

    def _schedule(self, key: Key, entry: _Entry) -> None:
        entry.scheduled = entry.due
        heapq.heappush(self._due, (entry.due, key))
        if len(self._due) > 2 * len(self._entries) + 64:  # mostly left over
            self._due = [(held.scheduled, key) for key, held in self._entries.items()]
            heapq.heapify(self._due)

    def _show(self, peer: PeerId, info: ServerInfo | None) -> Change | None:
        before = self._servers.get(peer)
        if before == info:
            return None
        if info is None:
            assert before is not None
            del self._servers[peer]
            change = Change("left", before)
        else:
            self._servers[peer] = info
            change = Change("updated" if before else "joined", info)
        self._revision += 1
        self._view = None
        return change

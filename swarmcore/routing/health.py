"""Who has failed of late, and for how long to do without them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from swarmcore.registry.base import Change
from swarmcore.types import PeerId, ServerInfo

FIRST_BAN = 5.0
LONGEST_BAN = 600.0
MISSED_PINGS = 3
"""Pings in a row without an answer that count as one failure."""

CAPACITY = 4096


@attrs.frozen
class Ban:
    """A peer that chains do without, unless nobody else holds the blocks."""

    until: float
    """On the clock of the ``now`` that was passed in."""
    failures: int
    """In a row, without a success in between."""
    reason: str
    """What went wrong last."""

    def __str__(self) -> str:
        return f"{self.failures} failures, last: {self.reason}"


@attrs.define
class _Record:
    failures: int = 0
    until: float = 0.0
    reason: str = ""
    missed: int = 0
    """Pings without an answer since the last one that had one."""
    by_pings: bool = False
    """Whether the ban is for missed pings alone."""


class PeerHealth:
    """Bans peers that fail, for twice as long each time; a success or a fresh announcement forgives.

    A plain object: ``now`` is passed in. Bans last from ``first`` to ``longest`` seconds. Failures during a
    ban tell of the same trouble and do not prolong it. Once a ban has been over for ``longest`` seconds, the
    failures before it are forgotten. At most ``capacity`` peers are remembered: the ban that ends first makes
    room.
    """

    def __init__(
        self, *, first: float = FIRST_BAN, longest: float = LONGEST_BAN, capacity: int = CAPACITY
    ) -> None:
        self._first = first
        self._longest = longest
        self._capacity = capacity
        self._records: dict[PeerId, _Record] = {}
        self._announced: dict[PeerId, ServerInfo] = {}

    def __repr__(self) -> str:
        return f"<PeerHealth {len(self._records)} peers have failed>"

    def failed(self, peer: PeerId, now: float, reason: str) -> None:
        """``peer`` broke off, did not answer in time, or did wrong: leave it alone for a while."""
        self._fail(self._record(peer, now), now, reason).by_pings = False

    def missed(self, peer: PeerId, now: float, reason: str) -> None:
        """``peer`` did not answer a ping. One may be lost; `MISSED_PINGS` in a row are a failure."""
        record = self._record(peer, now)
        record.missed += 1
        if record.missed >= MISSED_PINGS and record.until <= now:
            record.missed = 0
            self._fail(record, now, reason).by_pings = True

    def succeeded(self, peer: PeerId) -> None:
        """``peer`` did its work: whatever it failed before is forgiven."""
        self._records.pop(peer, None)

    def answered(self, peer: PeerId) -> None:
        """``peer`` answered a ping. That ends a ban for missed pings, and no other."""
        record = self._records.get(peer)
        if record is None:
            return
        record.missed = 0
        if record.by_pings or not record.failures:
            del self._records[peer]

    def update(self, change: Change, now: float) -> None:
        """Follow what peers announce. A new start, state, span or address forgives; new figures do not."""
        info = change.info
        before = self._announced.pop(info.peer, None)
        if change.kind != "left":
            self._announced[info.peer] = info
            if change.kind == "joined" or (before is not None and _is_fresh(before, info)):
                self._records.pop(info.peer, None)
        while len(self._announced) > 4 * self._capacity:
            del self._announced[next(iter(self._announced))]

    def banned(self, now: float) -> Mapping[PeerId, Ban]:
        """The bans that hold at ``now``."""
        return {
            peer: Ban(record.until, record.failures, record.reason)
            for peer, record in self._records.items()
            if record.until > now
        }

    def _fail(self, record: _Record, now: float, reason: str) -> _Record:
        if record.until <= now:
            record.failures += 1
            # Capped before it is raised to a power: failures are not.
            record.until = now + min(self._longest, self._first * 2.0 ** min(record.failures - 1, 64))
        record.reason = reason
        return record

    def _record(self, peer: PeerId, now: float) -> _Record:
        record = self._records.get(peer)
        if record is not None and now - record.until > self._longest and record.failures:
            del self._records[peer]
            record = None
        if record is None:
            if len(self._records) >= self._capacity:
                del self._records[min(self._records, key=lambda known: self._records[known].until)]
            record = self._records[peer] = _Record()
        return record


def _is_fresh(before: ServerInfo, now: ServerInfo) -> bool:
    return (
        before.incarnation != now.incarnation
        or before.state != now.state
        or before.span != now.span
        or before.addresses != now.addresses
    )

"""A peer's own record: issued, refreshed before it expires, and taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from swarmcore.errors import InternalError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.records import RecordIssuer, SignedRecord
from swarmcore.registry.gossip.replica import Replica
from swarmcore.registry.gossip.store import Accepted, Drop
from swarmcore.types import ServerInfo


class OwnRecord:
    """Issues this peer's records into its own ``replica``; the registry makes them known to others.

    ``publish`` is called with what is announced when it is time to `issue` that again: after a third of its
    ttl, or as `refresh_in` says.
    """

    def __init__(
        self, identity: Identity, replica: Replica, rng: Random, publish: Callable[[ServerInfo, float], None]
    ) -> None:
        self.announced: tuple[ServerInfo, float] | None = None
        """What is announced, and its ttl."""
        self._replica = replica
        self._issuer = RecordIssuer(identity, replica.now, replica.store.limits)
        self._rng = rng
        self._publish = publish
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def sequence(self) -> int:
        """Number of the last record."""
        return self._issuer.last_sequence

    def issue(self, info: ServerInfo, ttl: float) -> tuple[SignedRecord, Accepted]:
        """A new record of ``info``, and what it changed here. Raise `InputError` as `RecordIssuer` does."""
        record = self._issuer.announce(info, ttl)
        self.announced = (info, ttl)
        outcome = self._replica.apply(record)
        if outcome is Drop.REPLAYED:  # the clock was set back
            self._replica.store.forget_sequence(self._issuer.peer)
            outcome = self._replica.apply(record)
        if isinstance(outcome, Drop):
            raise InternalError(f"this peer dropped its own record as {outcome}")
        self.refresh_in(ttl / 3 * self._rng.uniform(0.9, 1.0))
        return record, outcome

    def refresh_in(self, delay: float) -> None:
        """Publish what is announced again after ``delay`` seconds, and not at the time set before."""
        self.pause()
        if self.announced is not None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay, self._publish, *self.announced)

    def pause(self) -> None:
        """Publish nothing until it is issued again, or `refresh_in` sets a time."""
        if self._timer is not None:
            self._timer.cancel()

    def forget(self) -> None:
        """Announce nothing any more, without a word to others."""
        self.announced = None
        self.pause()

    def withdraw(self) -> SignedRecord:
        """The record that takes back what was announced."""
        self.forget()
        withdrawal = self._issuer.withdraw()
        self._replica.apply(withdrawal)
        return withdrawal

    def issued_elsewhere(self, sequence: int) -> bool:
        """Whether this peer's record of that number is not from here: from before a restart, or from another
        process. The records that follow then supersede it."""
        if sequence <= self.sequence:
            return False
        self._issuer.supersede(sequence)
        return True

    def close(self) -> None:
        self._closed = True
        self.pause()

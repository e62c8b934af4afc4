"""One peer's copy of the swarm's records, alive: it expires them on time and tells others what it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from swarmcore.errors import ProtocolError
from swarmcore.registry.base import Change
from swarmcore.registry.changes import ChangeFeed
from swarmcore.registry.gossip.members import Members
from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.store import Accepted, Drop, RecordStore
from swarmcore.types import PeerId, ServerInfo

_SLICE = 32  # records verified between two turns of the event loop: some 5 ms
_LONGEST_SLEEP = 60.0  # between looks at the wall clock, which may be set while we sleep


class Replica:
    """A `RecordStore` on the running loop. Every change reaches `feed` and ``members``.

    ``on_accepted`` is called with every record taken, those that change nothing but their expiry included;
    ``on_change`` with every change, once `feed` has it; ``on_doubtful`` with a hidden peer of which a newer
    record came that may be from before its end.
    """

    def __init__(self, store: RecordStore, members: Members, wall_clock: Callable[[], float]) -> None:
        self.store = store
        self.feed = ChangeFeed()
        self.on_accepted: Callable[[SignedRecord, Accepted], None] = lambda record, accepted: None
        self.on_change: Callable[[Change], None] = lambda change: None
        self.on_doubtful: Callable[[ServerInfo], None] = lambda info: None
        self.now = wall_clock
        self._members = members
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def apply(self, record: SignedRecord) -> Accepted | Drop:
        """Take one record, if it is to be taken."""
        outcome = self.store.apply(record, self.now())
        if isinstance(outcome, Accepted):
            self._changed(outcome.change)
            self.on_accepted(record, outcome)
            if outcome.doubtful and outcome.announcement.info is not None:
                self.on_doubtful(outcome.announcement.info)
            self._set_timer()
        return outcome

    async def merge(self, records: Iterable[SignedRecord]) -> list[tuple[SignedRecord, Accepted]]:
        """Take many records without holding up the event loop; return those that were news.

        Raise `ProtocolError` at the first that is forged: nobody passes those on, and each costs a signature
        to find out. Those before it are taken.
        """
        taken = []
        for position, record in enumerate(records, 1):
            outcome = self.apply(record)
            if isinstance(outcome, Accepted):
                taken.append((record, outcome))
            elif outcome is Drop.FORGED:
                raise ProtocolError("a record came that its owner has not signed")
            if position % _SLICE == 0:
                await asyncio.sleep(0)
        return taken

    def hide(self, peer: PeerId, sequence: int, *, issued_before: float = 0.0) -> bool:
        """As `RecordStore.hide`; whether the peer was in the view."""
        return self._changed(self.store.hide(peer, sequence, self.now(), issued_before=issued_before))

    def unhide(self, peer: PeerId) -> bool:
        """As `RecordStore.unhide`; whether the peer was hidden."""
        return self._changed(self.store.unhide(peer))

    def close(self) -> None:
        """Stop expiring and end all readers of changes."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.feed.close()

    def _set_timer(self) -> None:
        due = self.store.next_due()
        if due is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + min(max(due - self.now(), 0.001), _LONGEST_SLEEP)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        for change in self.store.expire(self.now()):
            self._changed(change)
        self._set_timer()

    def _changed(self, change: Change | None) -> bool:
        if change is None:
            return False
        self._members.update(change)
        self.feed.publish(change)
        self.on_change(change)
        return True

"""Two processes with one identity: which of them is shown to the swarm. A plain object."""

from __future__ import annotations

from enum import Enum, auto

from swarmcore.registry.gossip.records import Announcement
from swarmcore.types import ServerInfo


class Resolution(Enum):
    """What to do about a record of this peer that this process did not issue."""

    ANNOUNCE = auto()
    """Announce again: the record is from before a restart, or its process has left or is the older one."""
    STEP_BACK = auto()
    """Announce nothing for now: another process, started later, is shown in place of this one."""


class IdentityConflict:
    """Another process that announces itself with this peer's identity.

    There is one record for each identity, so only one of the two can be shown. The one that was started last
    is, as after a restart; the other steps back, and announces itself at once when that one is gone: it has
    withdrawn, was found dead, or its record has expired.
    """

    def __init__(self) -> None:
        self.shown: ServerInfo | None = None
        """What the other process announces while this one has stepped back for it."""
        self.seen: ServerInfo | None = None
        """The last that was heard of another living process."""
        self._first = 0

    def announced(self, sequence: int) -> None:
        """This process has issued a record of that number."""
        self._first = self._first or sequence
        self.shown = None

    def resolve(self, announcement: Announcement, own: ServerInfo) -> Resolution:
        """A record of this peer has come that this process, which announces ``own``, did not issue."""
        alive = announcement.info is not None and 0 < self._first < announcement.sequence
        if not alive:
            self.shown = self.seen = None
            return Resolution.ANNOUNCE
        assert announcement.info is not None
        self.seen = announcement.info
        if _order(announcement.info) > _order(own):
            self.shown = announcement.info
            return Resolution.STEP_BACK
        return Resolution.ANNOUNCE

    def answered(self, info: ServerInfo) -> None:
        """Somebody with this peer's identity answers at the addresses of ``info``, which are not its own."""
        self.seen = info

    @property
    def note(self) -> str:
        """What the operator should know, in words; empty when there is nothing."""
        if self.seen is None:
            return ""
        where = ", ".join(self.seen.addresses) or "no address"
        which = (
            "it is shown to the swarm and this one is not" if self.shown is not None else "this one is shown"
        )
        return (
            f"another program runs with the same identity, at {where}: {which}; "
            f"stop one of them, or give each its own identity"
        )


def _order(info: ServerInfo) -> tuple[int, tuple[str, ...]]:
    return info.incarnation, info.addresses

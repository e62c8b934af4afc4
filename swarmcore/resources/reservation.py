"""What is counted, and what is held of it: reservations, and the scopes that they count in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum, StrEnum
from types import TracebackType
from typing import Protocol, Self

from swarmcore.types import PeerId, short


class Resource(StrEnum):
    """What is counted."""

    BYTES = "bytes"
    """Memory held for remote peers: messages that arrive or wait to be read, adapters, queues."""
    STREAMS = "streams"
    """Calls and channels that remote peers have open here."""
    CONNECTIONS = "connections"
    """Channels inside a peer's connection that have not said hello yet."""
    DESCRIPTORS = "descriptors"
    """Sockets: connections that were accepted or dialled."""
    DIALS = "dials"
    """Dials under way because a remote peer asked for them."""


class Priority(Enum):
    """Up to which share of a bound a reservation may fill its scopes."""

    LOW = 0.25
    MEDIUM = 0.75
    HIGH = 1.0


class Scope:
    """What one peer, protocol, all the unproven or all together hold of one resource."""

    __slots__ = ("bound", "evictable", "name", "reservations", "used", "waiting")

    def __init__(self, name: str, bound: int) -> None:
        self.name = name
        self.bound = bound
        self.used = 0
        self.reservations = 0
        # Oldest first; ordinary dicts become slow when they are emptied from the front.
        self.evictable: OrderedDict[Reservation, None] = OrderedDict()
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()


class Ledger(Protocol):
    """Where a reservation counts: the `ResourceManager` that gave it."""

    def resize(self, reservation: Reservation, amount: int, priority: Priority) -> None: ...

    def prove(self, reservation: Reservation, peer: PeerId) -> None: ...

    def release(self, reservation: Reservation) -> None: ...


class Reservation:
    """A part of a resource, held until `release`. Also a context manager, and an entry for `evict`."""

    __slots__ = ("_ledger", "amount", "evict", "peer", "resource", "scopes")

    def __init__(
        self,
        ledger: Ledger,
        resource: Resource,
        peer: PeerId | None,
        amount: int,
        scopes: Sequence[Scope],
    ) -> None:
        self._ledger = ledger
        self.scopes = scopes
        self.evict: Callable[[], object] | None = None
        self.resource = resource
        self.peer = peer
        """For whom; None while it has not proven its id."""
        self.amount = amount

    def resize(self, amount: int, priority: Priority = Priority.HIGH) -> None:
        """Hold ``amount`` from now on.

        Raise `ResourceLimitError`, and stay as it is, when that is too much.
        """
        if self.scopes:
            self._ledger.resize(self, amount, priority)

    def prove(self, peer: PeerId) -> None:
        """The peer has proven its id: count this for it, no longer among the unproven.

        Raise `ResourceLimitError` when the peer then holds too much; the reservation stays as it was.
        """
        if self.scopes and self.peer is None:
            self._ledger.prove(self, peer)

    def evictable(self, evict: Callable[[], object]) -> None:
        """From now on ``evict`` may be called, once, to make room for others; this is released before.

        Called again, it counts as just used.
        """
        self.keep()
        if self.scopes:
            self.evict = evict
            for scope in self.scopes:
                scope.evictable[self] = None

    def keep(self) -> None:
        """It is in use: no longer `evictable`."""
        if self.evict is not None:
            self.evict = None
            for scope in self.scopes:
                scope.evictable.pop(self, None)

    def release(self) -> None:
        """Give it back. Harmless when repeated."""
        if self.scopes:
            self._ledger.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        whose = short(self.peer) if self.peer else "an unproven peer"
        return f"<Reservation {self.amount} {self.resource} for {whose}{'' if self.scopes else ' released'}>"


class Waiting:
    """A request that gets its turn when there is room."""

    __slots__ = ("amount", "granted", "peer", "priority", "protocol", "resource", "scope")

    def __init__(
        self,
        peer: PeerId | None,
        resource: Resource,
        amount: int,
        protocol: str,
        priority: Priority,
        granted: Callable[[Reservation], object],
    ) -> None:
        self.peer = peer
        self.resource = resource
        self.amount = amount
        self.protocol = protocol
        self.priority = priority
        self.granted: Callable[[Reservation], object] | None = granted
        self.scope: Scope | None = None  # in whose queue it is

    def fits(self, scope: Scope) -> bool:
        return scope.used + self.amount <= scope.bound * self.priority.value

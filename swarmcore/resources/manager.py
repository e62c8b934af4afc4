"""Reservations of what remote peers make this process hold: refused, waited for, or made room for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import attrs

from swarmcore.errors import ResourceLimitError
from swarmcore.resources.limits import Bounds, Machine, ResourceLimits
from swarmcore.resources.reservation import Priority, Reservation, Resource, Scope, Waiting
from swarmcore.tasks import deadline_at
from swarmcore.types import PeerId


@attrs.frozen
class ResourceUse:
    """How one resource stands; of a `ResourceManager.snapshot`, and sent to others as it is."""

    resource: str
    used: int
    limit: int
    """The bound for all peers together."""
    peak: int = 0
    unproven: int = 0
    """The part of ``used`` that belongs to peers which have not proven an id."""
    peers: int = 0
    """How many proven peers hold some of it."""
    waiting: int = 0
    """Reservations that wait for room."""
    refused: int = 0
    """Reservations that were refused since the start."""
    evicted: int = 0
    """Reservations that had to make room since the start."""


class ResourceManager:
    """Counts what remote peers make this process hold, in the sense of go-libp2p's resource manager.

    Every reservation counts in the scope of all peers together, in that of its peer (or, before the peer has
    proven its id, that of all who have not), and in that of its protocol when one is named. Where a scope is
    full, those in it that are `Reservation.evictable` make room, the oldest first, and of all peers those
    that are unproven first of all; where none is, the reservation is refused (`reserve`) or waits its turn
    (`acquire`, `when_free`).

    A plain object without clock or tasks; one for each process, shared by what runs in it. Not for use from
    other threads than the event loop's.
    """

    def __init__(self, limits: ResourceLimits | None = None) -> None:
        self.limits = limits or ResourceLimits.of(Machine.here())
        self._system = {kind: Scope("all peers together", self._bounds(kind).system) for kind in Resource}
        self._unproven = {
            kind: Scope("peers that have not proven their id", self._bounds(kind).unproven)
            for kind in Resource
        }
        self._named: dict[tuple[str, Resource], Scope] = {}  # of peers and protocols
        self._peak: Counter[Resource] = Counter()
        self._waiting: Counter[Resource] = Counter()
        self._refused: Counter[Resource] = Counter()
        self._evicted: Counter[Resource] = Counter()

    @classmethod
    def of_calls(cls, most: int, of_peer: int) -> ResourceManager:
        """For this machine, with so many calls and channels of all peers and of each at a time."""
        return cls(ResourceLimits.of(Machine.here(), streams=most, of_peer=of_peer))

    # --- asking -----------------------------------------------------------------------------------------

    def reserve(
        self,
        peer: PeerId | None,
        resource: Resource,
        amount: int = 1,
        *,
        protocol: str = "",
        priority: Priority = Priority.HIGH,
        evict: Callable[[], object] | None = None,
    ) -> Reservation:
        """Hold ``amount`` for ``peer``, None while it has not proven its id, or refuse at once.

        ``evict`` makes it `Reservation.evictable` from the beginning. Raise `ResourceLimitError`, which
        names the bound, when a scope has no room up to the share that ``priority`` allows.
        """
        scopes = self._scopes(peer, resource, protocol)
        try:
            self._make_room(scopes, resource, amount, priority)
            # Asked for again: what made room may have been the last of the same peer or protocol.
            scopes = self._scopes(peer, resource, protocol)
            reservation = self._hold(peer, resource, amount, scopes)
        finally:
            self._forget_empty(scopes, resource)
        if evict is not None:
            reservation.evictable(evict)
        self._serve_waiting(scopes)  # what made room may have held more than was wanted
        return reservation

    async def acquire(
        self,
        peer: PeerId | None,
        resource: Resource,
        amount: int = 1,
        *,
        deadline: float,
        protocol: str = "",
        priority: Priority = Priority.HIGH,
    ) -> Reservation:
        """As `reserve`, but wait for room until the loop's clock shows ``deadline``.

        Those that wait get their turn in order, except that a peer which is at its own bound holds up nobody
        but itself. Raise `DeadlineExceededError` when the deadline passes, `ResourceLimitError` at once when
        so much never fits.
        """
        future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()

        def granted(reservation: Reservation) -> None:
            if future.done():  # cancelled a moment ago
                reservation.release()
            else:
                future.set_result(reservation)

        cancel = self.when_free(peer, resource, amount, granted, protocol=protocol, priority=priority)
        try:
            async with deadline_at(
                deadline,
                f"no room for {amount} {resource} came before the deadline; retry later or elsewhere",
            ):
                return await future
        except BaseException:
            cancel()
            if future.done() and not future.cancelled():
                future.result().release()
            raise

    def when_free(
        self,
        peer: PeerId | None,
        resource: Resource,
        amount: int,
        granted: Callable[[Reservation], object],
        *,
        protocol: str = "",
        priority: Priority = Priority.HIGH,
    ) -> Callable[[], None]:
        """Call ``granted`` with the reservation when there is room, at once if there is now.

        What makes room is not evicted for it. Return what takes the request back; harmless when it was
        granted. Raise `ResourceLimitError` when so much never fits.
        """
        waiting = Waiting(peer, resource, amount, protocol, priority, granted)
        scopes = self._scopes(peer, resource, protocol)
        try:
            for scope in scopes:
                if amount > scope.bound * priority.value:
                    raise self._refusal(scope, resource, amount, priority)
            self._waiting[resource] += 1
            self._grant_or_wait(waiting)
        finally:
            self._forget_empty(scopes, resource)

        def cancel() -> None:
            if (scope := waiting.scope) is not None:
                waiting.granted = waiting.scope = None
                del scope.waiting[waiting]
                self._waiting[resource] -= 1
                self._serve_waiting([scope])
                self._forget_empty([scope], resource)

        return cancel

    # --- looking ----------------------------------------------------------------------------------------

    def fits(self, peer: PeerId, resource: Resource, amount: int, priority: Priority = Priority.HIGH) -> bool:
        """Whether ``peer`` could `reserve` so much now without anything else making room."""
        own = self._named.get((f"peer {peer}", resource))
        scope = self._system[resource]
        return (
            amount + (own.used if own else 0) <= self._bounds(resource).peer * priority.value
            and amount + scope.used <= scope.bound * priority.value
        )

    def waiting(self, resource: Resource) -> int:
        """How many requests wait for room."""
        return self._waiting[resource]

    def used(self, resource: Resource, peer: PeerId | None = None) -> int:
        """How much is held by ``peer``, or by all together."""
        if peer is None:
            return self._system[resource].used
        scope = self._named.get((f"peer {peer}", resource))
        return scope.used if scope else 0

    def snapshot(self) -> tuple[ResourceUse, ...]:
        """How each resource stands."""
        holders = Counter(
            kind for (name, kind), scope in self._named.items() if scope.used and name[:5] == "peer "
        )
        return tuple(
            ResourceUse(
                kind.value,
                self._system[kind].used,
                self._system[kind].bound,
                self._peak[kind],
                self._unproven[kind].used,
                holders[kind],
                self._waiting[kind],
                self._refused[kind],
                self._evicted[kind],
            )
            for kind in Resource
        )

    @property
    def note(self) -> str:
        """What was refused and what had to make room since the start, in a line; empty when nothing was."""
        troubled = [use for use in self.snapshot() if use.refused or use.evicted]
        return "; ".join(
            f"{use.resource}: {use.used} of {use.limit} in use, {use.refused} times refused, "
            f"{use.evicted} times somebody had to make room"
            for use in troubled
        )

    def __repr__(self) -> str:
        used = ", ".join(f"{use.used} of {use.limit} {use.resource}" for use in self.snapshot())
        return f"<ResourceManager {used}>"

    # --- scopes -----------------------------------------------------------------------------------------

    def _bounds(self, resource: Resource) -> Bounds:
        bounds: Bounds = getattr(self.limits, resource.value)
        return bounds

    def _scopes(self, peer: PeerId | None, resource: Resource, protocol: str) -> list[Scope]:
        """The narrowest first: only when its own have room is anybody else asked to make some."""
        scopes = [self._unproven[resource] if peer is None else self._peer_scope(peer, resource)]
        if protocol:
            scopes.append(self._named_scope(protocol, resource, self._bounds(resource).protocol))
        scopes.append(self._system[resource])
        return scopes

    def _peer_scope(self, peer: PeerId, resource: Resource) -> Scope:
        return self._named_scope(f"peer {peer}", resource, self._bounds(resource).peer)

    def _named_scope(self, name: str, resource: Resource, bound: int) -> Scope:
        scope = self._named.get((name, resource))
        if scope is None:
            scope = self._named[name, resource] = Scope(name, bound)
        return scope

    def _forget_empty(self, scopes: Iterable[Scope], resource: Resource) -> None:
        """Nothing is kept of a peer or protocol that holds nothing and waits for nothing."""
        for scope in scopes:
            if (
                not scope.reservations
                and not scope.waiting
                and self._named.get((scope.name, resource)) is scope
            ):
                del self._named[scope.name, resource]

    # --- holding ----------------------------------------------------------------------------------------

    def _hold(
        self, peer: PeerId | None, resource: Resource, amount: int, scopes: Sequence[Scope]
    ) -> Reservation:
        for scope in scopes:
            scope.used += amount
            scope.reservations += 1
        self._note_peak(resource)
        return Reservation(self, resource, peer, amount, scopes)

    def _note_peak(self, resource: Resource) -> None:
        self._peak[resource] = max(self._peak[resource], self._system[resource].used)

    def resize(self, reservation: Reservation, amount: int, priority: Priority) -> None:
        more = amount - reservation.amount
        if more > 0:
            self._make_room(reservation.scopes, reservation.resource, more, priority, keep=reservation)
        reservation.amount = amount
        for scope in reservation.scopes:
            scope.used += more
        self._note_peak(reservation.resource)
        self._serve_waiting(reservation.scopes)

    def prove(self, reservation: Reservation, peer: PeerId) -> None:
        resource = reservation.resource
        unproven, proven = reservation.scopes[0], self._peer_scope(peer, resource)
        try:
            self._make_room([proven], resource, reservation.amount, Priority.HIGH)
        finally:
            self._forget_empty([proven], resource)
        proven = self._peer_scope(peer, resource)
        evict = reservation.evict
        reservation.keep()
        unproven.used -= reservation.amount
        unproven.reservations -= 1
        proven.used += reservation.amount
        proven.reservations += 1
        reservation.peer = peer
        reservation.scopes = (proven, *reservation.scopes[1:])
        if evict is not None:
            reservation.evictable(evict)
        self._serve_waiting([unproven])

    def release(self, reservation: Reservation) -> None:
        scopes = self._drop(reservation)
        self._serve_waiting(scopes)
        self._forget_empty(scopes, reservation.resource)

    def _drop(self, reservation: Reservation) -> Sequence[Scope]:
        reservation.keep()
        scopes, reservation.scopes = reservation.scopes, ()
        for scope in scopes:
            scope.used -= reservation.amount
            scope.reservations -= 1
        return scopes

    # --- making room ------------------------------------------------------------------------------------

    def _make_room(
        self,
        scopes: Iterable[Scope],
        resource: Resource,
        amount: int,
        priority: Priority,
        keep: Reservation | None = None,
    ) -> None:
        for scope in scopes:
            limit = scope.bound * priority.value
            while scope.used + amount > limit:
                victim = self._victim(scope, resource, keep) if amount <= limit else None
                if victim is None:
                    raise self._refusal(scope, resource, amount, priority)
                evict = victim.evict
                self._forget_empty(self._drop(victim), resource)
                self._evicted[resource] += 1
                if evict is not None:
                    evict()

    def _victim(self, scope: Scope, resource: Resource, keep: Reservation | None) -> Reservation | None:
        unproven = self._unproven[resource]
        # A few of the unproven are left alone while others could go: newcomers need a moment to prove an id.
        if scope is self._system[resource] and 4 * unproven.used >= unproven.bound and unproven.evictable:
            scope = unproven
        return next((held for held in scope.evictable if held is not keep), None)

    def _refusal(
        self, scope: Scope, resource: Resource, amount: int, priority: Priority
    ) -> ResourceLimitError:
        self._refused[resource] += 1
        limit = int(scope.bound * priority.value)
        return ResourceLimitError(
            f"{amount} more {resource} for {scope.name} would pass the bound of {limit} ({scope.used} are "
            f"held); retry later or elsewhere, with less at a time",
            resource=resource.value,
            scope=scope.name,
            limit=limit,
        )

    # --- those that wait --------------------------------------------------------------------------------

    def _grant_or_wait(self, waiting: Waiting, freed: Scope | None = None) -> None:
        """Give ``waiting`` its turn; ``freed`` is the scope in whose queue it was the first."""
        scopes = self._scopes(waiting.peer, waiting.resource, waiting.protocol)
        for scope in scopes:
            if not waiting.fits(scope) or (scope.waiting and scope is not freed):
                scope.waiting[waiting] = None
                waiting.scope = scope
                return
        granted, waiting.granted = waiting.granted, None
        waiting.scope = None
        self._waiting[waiting.resource] -= 1
        if granted is not None:
            granted(self._hold(waiting.peer, waiting.resource, waiting.amount, scopes))

    def _serve_waiting(self, scopes: Iterable[Scope]) -> None:
        for scope in scopes:
            while scope.waiting:
                first = next(iter(scope.waiting))
                if not first.fits(scope):
                    break
                del scope.waiting[first]
                self._grant_or_wait(first, freed=scope)

"""Whom to gossip with: live members, bootstrap peers, and members lost from sight."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from random import Random
from typing import TypeVar

import attrs

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.pacing import Backoff
from swarmcore.registry.base import Change
from swarmcore.rpc.dialing import NoSuccess, first_success
from swarmcore.types import Address, PeerId, ServerInfo

T = TypeVar("T")

REMEMBERED = 64
STAGGER = 0.3
"""Seconds that each member asked by `first_answer` is ahead of the next one."""
AT_ONCE = 8
"""Members asked by it at a time."""


@attrs.frozen
class Member:
    """A peer and the ways to reach it."""

    peer: PeerId
    addresses: tuple[Address, ...]


class Members:
    """Chooses peers to talk to. A plain object: randomness is given once, ``now`` is always passed in.

    A peer that fails is left alone for ``backoff`` seconds, twice as long each further time, up to
    ``max_backoff``. Members whose records ended are remembered, the last `REMEMBERED` of them: when a network
    split outlives all records, and the bootstrap peers are gone, they are the way back. Peers that were
    introduced count among them.
    """

    def __init__(
        self,
        own: PeerId,
        bootstrap: Iterable[Address],
        rng: Random,
        *,
        backoff: float = 5.0,
        max_backoff: float = 120.0,
    ) -> None:
        self._own = own
        self._rng = rng
        self._backoff = backoff
        self._max_backoff = max_backoff
        self._bootstrap = {p.peer: p for p in group_by_peer(bootstrap) if p.peer != own}
        self._live: dict[PeerId, Member] = {}
        self._order: list[PeerId] = []  # of the live ones, to draw from
        self._place: dict[PeerId, int] = {}
        self._lost: dict[PeerId, Member] = {}
        self._backoffs: dict[PeerId, Backoff] = {}

    def __repr__(self) -> str:
        return (
            f"<Members {len(self._live)} live · {len(self._lost)} lost · {len(self._backoffs)} backing off>"
        )

    @property
    def bootstrap(self) -> list[Member]:
        """The bootstrap peers, oneself left out."""
        return list(self._bootstrap.values())

    @property
    def candidates(self) -> list[Member]:
        """Whom to join through: the bootstrap peers, and those that were introduced or lost."""
        return [*self._bootstrap.values(), *(p for p in self._lost.values() if p.peer not in self._bootstrap)]

    def introduce(self, addresses: Iterable[Address]) -> list[Member]:
        """Try peers at ``addresses`` as if they had been lost, unless they are live; return those."""
        new = []
        for member in map(self._with_bootstrap_addresses, group_by_peer(addresses)):
            if member.peer == self._own or member.peer in self._live:
                continue
            if self._lost.get(member.peer) != member:
                self._backoffs.pop(member.peer, None)  # new or moved: worth a new try
                self._lose(member)
                new.append(member)
        return new

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        peer = change.info.peer
        if peer == self._own:
            return
        if change.kind == "left":
            self._remember(peer)
            return
        member = self.of(change.info)
        if self._live.get(peer) == member:
            return
        self._backoffs.pop(peer, None)  # new or moved: worth a new try
        self._lost.pop(peer, None)
        self._live[peer] = member
        if peer not in self._place:
            self._place[peer] = len(self._order)
            self._order.append(peer)

    def live(self, peer: PeerId) -> Member | None:
        """``peer``, if it is a live member or a bootstrap peer."""
        return self._live.get(peer) or self._bootstrap.get(peer)

    def choose(self, count: int, now: float, exclude: Collection[PeerId] = ()) -> list[Member]:
        """Up to ``count`` different peers at random: live members, and bootstrap peers that are not."""
        unlisted = [peer for peer in self._bootstrap if peer not in self._live]
        total = len(self._order) + len(unlisted)
        chosen: list[Member] = []
        # Some more than asked for, in place of those that are excluded or left alone.
        for place in self._rng.sample(range(total), min(total, 2 * count + 8)):
            peer = self._order[place] if place < len(self._order) else unlisted[place - len(self._order)]
            if len(chosen) == count:
                break
            if peer not in exclude and self._worth_trying(peer, now):
                chosen.append(self._live.get(peer) or self._bootstrap[peer])
        return chosen

    def choose_lost(self, now: float) -> Member | None:
        """A peer that is in no record now but was there once, if one is due to be tried again."""
        lost = {p.peer: p for p in self._bootstrap.values() if p.peer not in self._live} | self._lost
        due = [member for peer, member in lost.items() if self._worth_trying(peer, now)]
        return self._rng.choice(due) if due else None

    def failed(self, peer: PeerId, now: float) -> None:
        """``peer`` did not answer, or not well."""
        self._backoffs.setdefault(peer, Backoff(self._backoff, self._max_backoff)).failed(now)

    def answered(self, peer: PeerId) -> None:
        """``peer`` is well."""
        self._backoffs.pop(peer, None)

    def _worth_trying(self, peer: PeerId, now: float) -> bool:
        return peer not in self._backoffs or now >= self._backoffs[peer].until

    def of(self, info: ServerInfo) -> Member:
        """The member that announces ``info``."""
        return self._with_bootstrap_addresses(Member(info.peer, info.dialable))

    def _with_bootstrap_addresses(self, member: Member) -> Member:
        known = self._bootstrap.get(member.peer)
        if known is None:
            return member
        # The address that someone typed may work where the announced ones do not.
        more = tuple(a for a in known.addresses if a not in member.addresses)
        return Member(member.peer, member.addresses + more)

    def _remember(self, peer: PeerId) -> None:
        member = self._live.pop(peer, None)
        if member is None:
            return
        place, last = self._place.pop(peer), self._order.pop()
        if last != peer:
            self._order[place] = last
            self._place[last] = place
        self._lose(member)

    def _lose(self, member: Member) -> None:
        self._lost.pop(member.peer, None)
        self._lost[member.peer] = member
        if len(self._lost) > REMEMBERED:
            oldest = next(iter(self._lost))
            del self._lost[oldest]
            if oldest not in self._bootstrap:
                self._backoffs.pop(oldest, None)


def group_by_peer(addresses: Iterable[Address]) -> list[Member]:
    """Addresses of the same peer put together, in the order in which the peers first appear."""
    grouped: dict[PeerId, list[Address]] = {}
    for address in addresses:
        grouped.setdefault(address.peer, []).append(address)
    return [Member(peer, tuple(found)) for peer, found in grouped.items()]


def describe(members: Sequence[Member]) -> str:
    """The addresses of ``members``, for people."""
    return ", ".join(str(address) for member in members for address in member.addresses)


async def first_answer(
    members: Sequence[Member],
    attempt: Callable[[Member], Awaitable[T]],
    *,
    dispose: Callable[[T], object] = lambda answer: None,
) -> T:
    """The first answer that ``attempt`` gets from one of ``members``, tried in their order.

    Each starts when the one before has failed or `STAGGER` seconds later; at most `AT_ONCE` run at a time.
    Those still under way at the end are cancelled, and an answer that comes second is given to ``dispose``.
    Raise `PeerUnreachableError`, naming all that was tried and why it failed, when there is no answer.
    """
    failures: list[str] = []

    def failed(place: int, exc: SwarmError) -> None:
        failures.append(f"{describe([members[place]])} ({exc.message})")

    attempts = [partial(attempt, member) for member in members]
    try:
        return await first_success(attempts, stagger=STAGGER, at_once=AT_ONCE, failed=failed, dispose=dispose)
    except NoSuccess:
        reasons = "; ".join(failures)
        raise PeerUnreachableError(f"none of the peers to join through answers: {reasons}") from None

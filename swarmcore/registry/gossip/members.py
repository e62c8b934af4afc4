"""Whom to gossip with: live members, bootstrap peers, and members lost from sight."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from random import Random

import attrs

from swarmcore.pacing import Backoff
from swarmcore.registry.base import Change
from swarmcore.types import Address, PeerId, ServerInfo

REMEMBERED = 64


@attrs.frozen
class Partner:
    """A peer and the ways to reach it."""

    peer: PeerId
    addresses: tuple[Address, ...]


@attrs.define
class _Trouble:
    """A peer that did not answer of late."""

    backoff: Backoff
    retry_at: float


class Partners:
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
        self._live: dict[PeerId, Partner] = {}
        self._order: list[PeerId] = []  # of the live ones, to draw from
        self._place: dict[PeerId, int] = {}
        self._lost: dict[PeerId, Partner] = {}
        self._troubles: dict[PeerId, _Trouble] = {}

    def __repr__(self) -> str:
        return (
            f"<Partners {len(self._live)} live · {len(self._lost)} lost · {len(self._troubles)} in trouble>"
        )

    @property
    def bootstrap(self) -> list[Partner]:
        """The bootstrap peers, oneself left out."""
        return list(self._bootstrap.values())

    @property
    def candidates(self) -> list[Partner]:
        """Whom to join through: the bootstrap peers, and those that were introduced or lost."""
        return [*self._bootstrap.values(), *(p for p in self._lost.values() if p.peer not in self._bootstrap)]

    def introduce(self, addresses: Iterable[Address]) -> list[Partner]:
        """Try peers at ``addresses`` as if they had been lost, unless they are live; return those."""
        new = []
        for partner in map(self._with_typed, group_by_peer(addresses)):
            if partner.peer == self._own or partner.peer in self._live:
                continue
            if self._lost.get(partner.peer) != partner:
                self._troubles.pop(partner.peer, None)  # new or moved: worth a new try
                self._lose(partner)
                new.append(partner)
        return new

    def update(self, change: Change) -> None:
        """Follow a change of the view."""
        peer = change.info.peer
        if peer == self._own:
            return
        if change.kind == "left":
            self._remember(peer)
            return
        partner = self.reached_by(change.info)
        if self._live.get(peer) == partner:
            return
        self._troubles.pop(peer, None)  # new or moved: worth a new try
        self._lost.pop(peer, None)
        self._live[peer] = partner
        if peer not in self._place:
            self._place[peer] = len(self._order)
            self._order.append(peer)

    def live(self, peer: PeerId) -> Partner | None:
        """``peer``, if it is a live member or a bootstrap peer."""
        return self._live.get(peer) or self._bootstrap.get(peer)

    def choose(self, count: int, now: float, exclude: Collection[PeerId] = ()) -> list[Partner]:
        """Up to ``count`` different peers at random: live members, and bootstrap peers that are not."""
        unlisted = [peer for peer in self._bootstrap if peer not in self._live]
        total = len(self._order) + len(unlisted)
        chosen: list[Partner] = []
        # Some more than asked for, in place of those that are excluded or in trouble.
        for place in self._rng.sample(range(total), min(total, 2 * count + 8)):
            peer = self._order[place] if place < len(self._order) else unlisted[place - len(self._order)]
            if len(chosen) == count:
                break
            if peer not in exclude and self._worth_trying(peer, now):
                chosen.append(self._live.get(peer) or self._bootstrap[peer])
        return chosen

    def choose_lost(self, now: float) -> Partner | None:
        """A peer that is in no record now but was there once, if one is due to be tried again."""
        lost = {p.peer: p for p in self._bootstrap.values() if p.peer not in self._live} | self._lost
        due = [partner for peer, partner in lost.items() if self._worth_trying(peer, now)]
        return self._rng.choice(due) if due else None

    def failed(self, peer: PeerId, now: float) -> None:
        """``peer`` did not answer, or not well."""
        known = self._troubles.get(peer)
        backoff = known.backoff if known else Backoff(self._backoff, self._max_backoff)
        self._troubles[peer] = _Trouble(backoff, now + backoff.next())

    def answered(self, peer: PeerId) -> None:
        """``peer`` is well."""
        self._troubles.pop(peer, None)

    def _worth_trying(self, peer: PeerId, now: float) -> bool:
        return peer not in self._troubles or now >= self._troubles[peer].retry_at

    def reached_by(self, info: ServerInfo) -> Partner:
        """The ways to reach a peer that announces ``info``."""
        return self._with_typed(Partner(info.peer, info.dialable))

    def _with_typed(self, partner: Partner) -> Partner:
        known = self._bootstrap.get(partner.peer)
        if known is None:
            return partner
        # The address that someone typed may work where the announced ones do not.
        more = tuple(a for a in known.addresses if a not in partner.addresses)
        return Partner(partner.peer, partner.addresses + more)

    def _remember(self, peer: PeerId) -> None:
        partner = self._live.pop(peer, None)
        if partner is None:
            return
        place, last = self._place.pop(peer), self._order.pop()
        if last != peer:
            self._order[place] = last
            self._place[last] = place
        self._lose(partner)

    def _lose(self, partner: Partner) -> None:
        self._lost.pop(partner.peer, None)
        self._lost[partner.peer] = partner
        if len(self._lost) > REMEMBERED:
            oldest = next(iter(self._lost))
            del self._lost[oldest]
            if oldest not in self._bootstrap:
                self._troubles.pop(oldest, None)


def group_by_peer(addresses: Iterable[Address]) -> list[Partner]:
    """Addresses of the same peer put together, in the order in which the peers first appear."""
    grouped: dict[PeerId, list[Address]] = {}
    for address in addresses:
        grouped.setdefault(address.peer, []).append(address)
    return [Partner(peer, tuple(found)) for peer, found in grouped.items()]


def describe(partners: Sequence[Partner]) -> str:
    """The addresses of ``partners``, for people."""
    return ", ".join(str(address) for partner in partners for address in partner.addresses)

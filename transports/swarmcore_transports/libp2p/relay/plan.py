"""Which relays to ask for a place, and when."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import attrs
from multiaddr import Multiaddr

from swarmcore.types import PeerId

PLACES = 2
"""Places to keep: when one relay dies, there is one that works already."""

FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds before a relay that gave no place is asked again: doubled each time, up to the second."""

SHORTEST_TERM, LONGEST_TERM = 60.0, 86_400.0
"""A relay says until which time of day it keeps a place, and its clock may be wrong."""

_HELD_AGAINST = 2
"""Failures in a row that still count when a relay has come back."""

_KNOWN = 32
"""Relays that are remembered at most, besides the given ones."""

_FORGET_AFTER = 6
"""Failures in a row after which a relay that is not near and was not given is forgotten."""


@attrs.define
class Place:
    """What a relay keeps for this peer."""

    addresses: list[Multiaddr]
    """Addresses of this peer through the relay."""
    until: float
    renew_at: float


@attrs.define
class _Relay:
    given: bool
    near: bool = False
    place: Place | None = None
    asking: bool = False
    failures: int = 0
    not_before: float = float("-inf")


class RelayPlan:
    """A plain object: relays that are near, their answers and ``now`` go in, whom to ask comes out.

    ``given`` relays are asked before all others. Others are asked while they are near, that is, directly
    connected and offering the service, or when they kept a place before.
    """

    def __init__(self, given: Iterable[PeerId], rng: random.Random) -> None:
        self._rng = rng
        self._relays = {relay: _Relay(given=True) for relay in given}

    def __repr__(self) -> str:
        return f"<RelayPlan {len(self.places())} places at {len(self._relays)} relays>"

    def places(self) -> dict[PeerId, Place]:
        """Those that are kept now."""
        return {peer: relay.place for peer, relay in self._relays.items() if relay.place}

    def see(self, near: Iterable[PeerId], now: float) -> None:
        """``near`` are the relays that this peer is directly connected to. Places at others are lost."""
        near = dict.fromkeys(near)
        for peer, relay in list(self._relays.items()):
            if peer in near and not relay.near:
                # It may have been away when it was asked.
                relay.not_before = min(relay.not_before, now)
                relay.failures = min(relay.failures, _HELD_AGAINST)
            relay.near = peer in near
            if relay.place and (not relay.near or now >= relay.place.until):
                relay.place = None
                self._put_off(relay, now)
        for peer in near:
            if peer not in self._relays and sum(not relay.given for relay in self._relays.values()) < _KNOWN:
                self._relays[peer] = _Relay(given=False, near=True)
        for peer, relay in list(self._relays.items()):
            forgettable = not (relay.given or relay.near or relay.asking)
            if forgettable and (relay.failures == 0 or relay.failures > _FORGET_AFTER):
                del self._relays[peer]

    def again(self, now: float) -> None:
        """What went wrong before says nothing any more: own addresses have changed."""
        for relay in self._relays.values():
            relay.not_before, relay.failures = min(relay.not_before, now), 0

    def next(self, now: float) -> list[PeerId]:
        """Whom to ask now; each is to be answered by `granted` or `refused`."""
        due = [
            peer
            for peer, relay in self._relays.items()
            if relay.place and now >= relay.place.renew_at and not relay.asking
        ]
        kept_or_asked = [relay for relay in self._relays.values() if relay.place or relay.asking]
        wanted = PLACES - len(kept_or_asked)
        if wanted > 0:
            free = [
                peer
                for peer, relay in self._relays.items()
                if not relay.place and not relay.asking and now >= relay.not_before
            ]
            self._rng.shuffle(free)
            free.sort(key=self._order)
            due += free[:wanted]
        for peer in due:
            self._relays[peer].asking = True
        return due

    def _order(self, peer: PeerId) -> tuple[bool, bool]:
        relay = self._relays[peer]
        return (not relay.given, not relay.near)

    def granted(self, peer: PeerId, addresses: Sequence[Multiaddr], seconds: float, now: float) -> None:
        """``peer`` keeps a place for ``seconds``, at which this peer has ``addresses``."""
        relay = self._relays[peer]
        seconds = min(max(seconds, SHORTEST_TERM), LONGEST_TERM)
        relay.place = Place(list(addresses), now + seconds, now + seconds / 2)
        relay.asking, relay.near = False, True
        relay.failures = 0

    def refused(self, peer: PeerId, now: float) -> None:
        """``peer`` gives no place, or cannot be reached."""
        relay = self._relays[peer]
        relay.place, relay.asking = None, False
        self._put_off(relay, now)

    def _put_off(self, relay: _Relay, now: float) -> None:
        seconds = min(FIRST_RETRY * 2**relay.failures, LAST_RETRY)
        relay.failures += 1
        relay.not_before = now + seconds * self._rng.uniform(0.5, 1.0)

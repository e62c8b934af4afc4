"""Which relays to ask for a reservation, and when."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import attrs
from multiaddr import Multiaddr

from swarmcore.types import PeerId

RESERVATIONS = 2
"""Reservations to keep: when one relay dies, there is one that works already."""

FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds before a relay that gave no reservation is asked again: doubled each time, up to the second."""

MIN_TERM, MAX_TERM = 60.0, 86_400.0
"""A relay says until which time of day a reservation holds, and its clock may be wrong."""

_MAX_FAILURES_ON_RETURN = 2
"""Failures in a row that still count when a relay has come back."""

_MAX_KNOWN = 32
"""Relays that are remembered at most, besides the given ones."""

_FORGET_AFTER_FAILURES = 6
"""Failures in a row after which a relay that is not near and was not given is forgotten."""


@attrs.define
class Reservation:
    """What a relay has given to this peer."""

    addresses: list[Multiaddr]
    """Addresses of this peer through the relay."""
    until: float
    renew_at: float


@attrs.define
class _Relay:
    preferred: bool
    connected: bool = False
    reservation: Reservation | None = None
    requesting: bool = False
    failures: int = 0
    retry_at: float = float("-inf")


class RelayPlan:
    """A plain object: relays that are near, their answers and ``now`` go in, whom to ask comes out.

    ``preferred`` relays are asked before all others. Others are asked while they are directly
    connected and offer the service, or when they gave a reservation before.
    """

    def __init__(self, preferred: Iterable[PeerId], rng: random.Random) -> None:
        self._rng = rng
        self._relays = {relay: _Relay(preferred=True) for relay in preferred}

    def __repr__(self) -> str:
        return f"<RelayPlan {len(self.reservations())} reservations at {len(self._relays)} relays>"

    def reservations(self) -> dict[PeerId, Reservation]:
        """Those that are kept now."""
        return {peer: relay.reservation for peer, relay in self._relays.items() if relay.reservation}

    def update_connected(self, connected: Iterable[PeerId], now: float) -> None:
        """This peer is directly connected to the relays ``connected``; reservations at others are lost."""
        connected = dict.fromkeys(connected)
        for peer, relay in list(self._relays.items()):
            if peer in connected and not relay.connected:
                # It may have been away when it was asked.
                relay.retry_at = min(relay.retry_at, now)
                relay.failures = min(relay.failures, _MAX_FAILURES_ON_RETURN)
            relay.connected = peer in connected
            if relay.reservation and (not relay.connected or now >= relay.reservation.until):
                relay.reservation = None
                self._back_off(relay, now)
        for peer in connected:
            if (
                peer not in self._relays
                and sum(not relay.preferred for relay in self._relays.values()) < _MAX_KNOWN
            ):
                self._relays[peer] = _Relay(preferred=False, connected=True)
        for peer, relay in list(self._relays.items()):
            forgettable = not (relay.preferred or relay.connected or relay.requesting)
            if forgettable and (relay.failures == 0 or relay.failures > _FORGET_AFTER_FAILURES):
                del self._relays[peer]

    def retry_all(self, now: float) -> None:
        """What went wrong before says nothing any more: own addresses have changed."""
        for relay in self._relays.values():
            relay.retry_at, relay.failures = min(relay.retry_at, now), 0

    def next_requests(self, now: float) -> list[PeerId]:
        """Whom to ask now; each is to be answered by `granted` or `refused`."""
        due = [
            peer
            for peer, relay in self._relays.items()
            if relay.reservation and now >= relay.reservation.renew_at and not relay.requesting
        ]
        kept_or_asked = [relay for relay in self._relays.values() if relay.reservation or relay.requesting]
        wanted = RESERVATIONS - len(kept_or_asked)
        if wanted > 0:
            free = [
                peer
                for peer, relay in self._relays.items()
                if not relay.reservation and not relay.requesting and now >= relay.retry_at
            ]
            self._rng.shuffle(free)
            free.sort(key=self._order)
            due += free[:wanted]
        for peer in due:
            self._relays[peer].requesting = True
        return due

    def _order(self, peer: PeerId) -> tuple[bool, bool]:
        relay = self._relays[peer]
        return (not relay.preferred, not relay.connected)

    def granted(self, peer: PeerId, addresses: Sequence[Multiaddr], seconds: float, now: float) -> None:
        """``peer`` has given a reservation for ``seconds``, by which this peer has ``addresses``."""
        relay = self._relays[peer]
        seconds = min(max(seconds, MIN_TERM), MAX_TERM)
        relay.reservation = Reservation(list(addresses), now + seconds, now + seconds / 2)
        relay.requesting, relay.connected = False, True
        relay.failures = 0

    def refused(self, peer: PeerId, now: float) -> None:
        """``peer`` gives no reservation, or cannot be reached."""
        relay = self._relays[peer]
        relay.reservation, relay.requesting = None, False
        self._back_off(relay, now)

    def _back_off(self, relay: _Relay, now: float) -> None:
        seconds = min(FIRST_RETRY * 2**relay.failures, LAST_RETRY)
        relay.failures += 1
        relay.retry_at = now + seconds * self._rng.uniform(0.5, 1.0)

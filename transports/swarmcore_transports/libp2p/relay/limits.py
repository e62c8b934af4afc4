"""What a relay gives, to whom, and how much of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum

import attrs
from libp2p.relay.circuit_v2.protocol_buffer import StatusCode

from swarmcore.types import PeerId


@attrs.frozen
class RelayLimits:
    """How much of itself a relay gives. A host is an IP address: one machine may be many peers."""

    reservations: int = 128
    """Peers that may have a reservation, to be reached by others."""
    reservations_per_host: int = 16
    reservation_seconds: float = 3600.0
    """For how long a reservation holds unless it is renewed."""
    circuits: int = 256
    """Open at a time, those being set up among them."""
    circuits_per_target: int = 64
    circuits_per_host: int = 32
    """Of one dialling host."""
    circuit_bytes: int = 16 * 2**30
    """Through one circuit, in each direction."""
    circuit_seconds: float = 6 * 3600.0
    bytes_per_second: float = 16e6
    """Of all circuits together, both directions added up. Above it, all wait for their turn."""


class RelayRefusal(Exception):
    """The relay does not do what it is asked; ``status`` goes back to the asker."""

    def __init__(self, status: StatusCode) -> None:
        super().__init__(status.name)
        self.status = status


class Direction(Enum):
    """A direction of a circuit, seen from the peer that dialled."""

    TO_TARGET = 0
    TO_SOURCE = 1


@attrs.define
class _Reservation:
    host: str
    until: float


@attrs.define(eq=False)
class Circuit:
    """One open circuit, or one being set up."""

    source_host: str
    target: PeerId
    _bytes_left: dict[Direction, int]

    def count_bytes(self, direction: Direction, size: int) -> None:
        """Count ``size`` bytes; raise `RelayRefusal` when they are more than the circuit may carry."""
        self._bytes_left[direction] -= size
        if self._bytes_left[direction] < 0:
            raise RelayRefusal(StatusCode.RESOURCE_LIMIT_EXCEEDED)


class RelayResources:
    """Which peers have reservations at this relay, which circuits are open, and how fast bytes may pass."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self._reservations: dict[PeerId, _Reservation] = {}
        self._circuits: set[Circuit] = set()
        self._busy_until = float("-inf")

    def __repr__(self) -> str:
        return f"<RelayAccounts {len(self._reservations)} reservations, {len(self._circuits)} circuits>"

    def expire(self, connected: Callable[[PeerId], bool], now: float) -> None:
        """Drop the reservations that have expired, and those of peers that are not connected any more."""
        self._reservations = {
            peer: reservation
            for peer, reservation in self._reservations.items()
            if now < reservation.until and connected(peer)
        }

    def reserve(self, peer: PeerId, host: str, now: float) -> None:
        """Give ``peer`` a reservation, or renew it. Raise `RelayRefusal` when there are too many."""
        others = [reservation.host for other, reservation in self._reservations.items() if other != peer]
        if len(others) >= self.limits.reservations or others.count(host) >= self.limits.reservations_per_host:
            raise RelayRefusal(StatusCode.RESERVATION_REFUSED)
        self._reservations[peer] = _Reservation(host, now + self.limits.reservation_seconds)

    def open(self, source_host: str, target: PeerId, now: float) -> Circuit:
        """A circuit to ``target``, to be given to `close`. Raise `RelayRefusal` when there may be none."""
        reservation = self._reservations.get(target)
        if reservation is None or now >= reservation.until:
            raise RelayRefusal(StatusCode.NO_RESERVATION)
        hosts = Counter(circuit.source_host for circuit in self._circuits)
        targets = Counter(circuit.target for circuit in self._circuits)
        if (
            len(self._circuits) >= self.limits.circuits
            or hosts[source_host] >= self.limits.circuits_per_host
            or targets[target] >= self.limits.circuits_per_target
        ):
            raise RelayRefusal(StatusCode.RESOURCE_LIMIT_EXCEEDED)
        circuit = Circuit(source_host, target, dict.fromkeys(Direction, self.limits.circuit_bytes))
        self._circuits.add(circuit)
        return circuit

    def close(self, circuit: Circuit) -> None:
        self._circuits.discard(circuit)

    def delay(self, size: int, now: float) -> float:
        """Seconds after which ``size`` bytes that have come may be passed on.

        Whoever asks first goes first, so that circuits that all want to send get equal shares.
        """
        begin = max(now, self._busy_until)
        self._busy_until = begin + size / self.limits.bytes_per_second
        return begin - now

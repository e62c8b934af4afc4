"""What a relay gives, decided without a socket."""

from __future__ import annotations

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from libp2p.relay.circuit_v2.protocol_buffer import StatusCode

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.relay.limits import Direction, RelayLimits, RelayRefusal, RelayResources

A, B, C = (PeerId(name) for name in "ABC")


def accounts(**limits: float) -> RelayResources:
    return RelayResources(RelayLimits(**limits))


def refused(status: StatusCode):
    return pytest.raises(RelayRefusal, match=status.name)


def everybody(peer: PeerId) -> bool:
    return True


def test_reservations_are_bounded_over_all_and_for_each_host():
    relay = accounts(reservations=2, reservations_per_host=1)
    relay.reserve(A, "host", 0)
    with refused(StatusCode.RESERVATION_REFUSED):
        relay.reserve(B, "host", 0)
    relay.reserve(B, "other", 0)
    with refused(StatusCode.RESERVATION_REFUSED):
        relay.reserve(C, "third", 0)
    relay.reserve(A, "host", 1)  # renewing takes no second one


def test_a_place_ends_with_its_time_unless_renewed():
    relay = accounts(reservation_seconds=10)
    relay.reserve(A, "host", 0)
    relay.reserve(B, "host", 0)
    relay.reserve(A, "host", 9)
    relay.open("source", A, 10)
    with refused(StatusCode.NO_RESERVATION):
        relay.open("source", B, 10)


def test_a_place_is_free_when_its_peer_has_left():
    relay = accounts(reservations=1)
    relay.reserve(A, "host", 0)
    relay.expire(everybody, 1)
    with refused(StatusCode.RESERVATION_REFUSED):
        relay.reserve(B, "host", 1)
    relay.expire(lambda peer: peer != A, 1)
    relay.reserve(B, "host", 1)
    with refused(StatusCode.NO_RESERVATION):
        relay.open("source", A, 1)


@pytest.mark.parametrize(
    "limits", [{"circuits": 1}, {"circuits_per_target": 1}, {"circuits_per_host": 1}], ids=str
)
def test_circuits_are_bounded(limits: dict[str, int]):
    relay = accounts(**limits)
    relay.reserve(A, "host", 0)
    first = relay.open("source", A, 0)
    with refused(StatusCode.RESOURCE_LIMIT_EXCEEDED):
        relay.open("source", A, 0)
    relay.close(first)
    relay.open("source", A, 0)


def test_one_host_leaves_room_for_others():
    relay = accounts(circuits_per_host=1)
    relay.reserve(A, "host", 0)
    relay.open("source", A, 0)
    relay.open("other", A, 0)


def test_each_direction_of_a_circuit_carries_so_many_bytes():
    relay = accounts(circuit_bytes=100)
    relay.reserve(A, "host", 0)
    circuit = relay.open("source", A, 0)
    circuit.count_bytes(Direction.TO_TARGET, 100)
    circuit.count_bytes(Direction.TO_SOURCE, 60)
    with refused(StatusCode.RESOURCE_LIMIT_EXCEEDED):
        circuit.count_bytes(Direction.TO_TARGET, 1)
    with refused(StatusCode.RESOURCE_LIMIT_EXCEEDED):
        circuit.count_bytes(Direction.TO_SOURCE, 41)


def test_circuits_share_the_rate_in_turn():
    relay = accounts(bytes_per_second=100)
    assert [relay.delay(50, 10.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert relay.delay(50, 11.0) == 0.5
    assert relay.delay(50, 99.0) == 0.0

"""Which relays are asked for a reservation, and when, decided without a socket or a clock."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from multiaddr import Multiaddr

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.relay.plan import (
    LAST_RETRY,
    MAX_TERM,
    MIN_TERM,
    RESERVATIONS,
    RelayPlan,
)

A, B, C, D = (PeerId(name) for name in "ABCD")
AT = [Multiaddr("/ip4/192.0.2.1/tcp/1")]


def plan(*preferred: PeerId) -> RelayPlan:
    return RelayPlan(preferred, Random(0))


def grant(plan: RelayPlan, *relays: PeerId, now: float, seconds: float = 1000.0) -> None:
    for relay in relays:
        plan.granted(relay, AT, seconds, now)


def test_given_relays_are_asked_first_and_two_are_enough():
    relays = plan(A)
    relays.update_connected([B, C, D], 0)
    first = relays.next_requests(0)
    assert first[0] == A
    assert len(first) == RESERVATIONS
    assert relays.next_requests(0) == []  # they have not answered yet
    grant(relays, *first, now=0)
    assert relays.next_requests(1) == []
    assert set(relays.reservations()) == set(first)


def test_a_place_is_renewed_at_half_of_its_time():
    relays = plan(A)
    relays.next_requests(0)
    grant(relays, A, now=0, seconds=1000)
    relays.update_connected([A], 499)
    assert relays.next_requests(499) == []
    assert relays.next_requests(500) == [A]
    assert A in relays.reservations()  # kept meanwhile
    grant(relays, A, now=501, seconds=1000)
    assert relays.reservations()[A].until == 1501


def test_a_relay_that_refuses_is_left_for_another_and_asked_again_later():
    relays = plan(A, B)
    relays.update_connected([C], 0)
    assert relays.next_requests(0) == [A, B] or relays.next_requests(0) == [B, A]
    grant(relays, B, now=0)
    relays.refused(A, 0)
    assert relays.next_requests(0) == [C]
    relays.refused(C, 0)
    assert relays.next_requests(0) == []
    assert relays.next_requests(1) == [A]


def test_a_refusal_is_waited_out_longer_each_time():
    relays, now, waits = plan(A), 0.0, []
    relays.next_requests(now)
    for _ in range(10):
        relays.refused(A, now)
        asked = now
        while not relays.next_requests(now):
            now += 0.25
        waits.append(now - asked)
    assert waits[0] <= 1.0
    assert waits[5] > 4 * waits[1]
    assert LAST_RETRY / 2 <= waits[-1] <= LAST_RETRY


def test_on_another_network_a_relay_that_refused_is_asked_at_once():
    relays = plan(A)
    for now in (0, 100, 200):
        assert relays.next_requests(now) == [A]
        relays.refused(A, now)
    assert relays.next_requests(200) == []
    relays.retry_all(200)
    assert relays.next_requests(200) == [A]


def test_a_place_is_lost_with_the_connection_and_another_relay_taken():
    relays = plan()
    relays.update_connected([A, B, C], 0)
    held = relays.next_requests(0)
    grant(relays, *held, now=0)
    (spare,) = {A, B, C} - set(held)
    relays.update_connected([held[1], spare], 10)
    assert set(relays.reservations()) == {held[1]}
    assert relays.next_requests(10) == [spare]


def test_a_lost_relay_is_asked_again_when_there_is_no_other():
    relays = plan()
    relays.update_connected([A], 0)
    grant(relays, *relays.next_requests(0), now=0)
    relays.update_connected([], 10)
    assert relays.reservations() == {}
    assert relays.next_requests(11) == [A]


def test_a_place_ends_with_its_time():
    relays = plan(A)
    relays.next_requests(0)
    grant(relays, A, now=0, seconds=100)
    relays.update_connected([A], 99)
    assert relays.reservations()
    relays.update_connected([A], 100)
    assert not relays.reservations()


@pytest.mark.parametrize(("said", "kept"), [(-5.0, MIN_TERM), (1e12, MAX_TERM), (600.0, 600.0)])
def test_a_relay_with_a_wrong_clock(said: float, kept: float):
    relays = plan(A)
    relays.next_requests(0)
    grant(relays, A, now=0, seconds=said)
    assert relays.reservations()[A].until == kept


def test_what_never_answered_is_forgotten_but_not_what_was_given():
    relays, now = plan(A), 0.0
    relays.update_connected([B], now)
    for _ in range(2000):
        for relay in relays.next_requests(now):
            relays.refused(relay, now)
        relays.update_connected([], now)
        now += 1
    assert repr(relays) == "<RelayPlan 0 reservations at 1 relays>"


@pytest.mark.parametrize("seed", range(8))
def test_a_reservation_is_kept_while_relays_come_and_go(seed: int):
    """Half of the relays are away at any time, one of four refuses; one is missed for seconds at most."""
    world, relays = Random(seed), RelayPlan([], Random(seed))
    names = [PeerId(f"relay{number}") for number in range(8)]
    away = dict.fromkeys(names, 0.0)
    without, longest, now = 0.0, 0.0, 0.0
    while now < 2000:
        for name in names:
            if now >= away[name] + 100:
                away[name] = now + world.uniform(50, 300)
        connected = [name for name in names if now < away[name]]
        relays.update_connected(connected, now)
        for relay in relays.next_requests(now):
            if relay in connected and world.random() < 0.75:
                relays.granted(relay, AT, 120, now)
            else:
                relays.refused(relay, now)
        assert len(relays.reservations()) <= RESERVATIONS
        without = 0.0 if relays.reservations() or len(connected) < 2 else without + 0.5
        longest = max(longest, without)
        now += 0.5
    assert longest <= 15

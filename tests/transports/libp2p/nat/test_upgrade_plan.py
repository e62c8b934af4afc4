from __future__ import annotations

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.nat import upgrade_plan as upgrades
from swarmcore_transports.libp2p.nat.upgrade_plan import ATTEMPTS, BACKOFF_SECONDS, PAUSE_SECONDS, Upgrades

A, B = PeerId("a"), PeerId("b")


def give_up(plan: Upgrades, peer: PeerId, now: float) -> float:
    """Fail until the peer is left alone; when that is."""
    for backoff in BACKOFF_SECONDS:
        assert plan.take(now) == [peer]
        assert not plan.failed(peer, "closed", now)
        assert plan.next_at() == now + backoff
        now += backoff
    assert plan.take(now) == [peer]
    assert plan.given_up() == []
    assert plan.failed(peer, "closed", now)
    assert plan.given_up() == ["closed"]
    return now


def test_a_relayed_peer_is_tried_at_once_and_by_one_attempt_at_a_time():
    plan = Upgrades()
    plan.relayed(A, 5.0)
    assert plan.take(5.0) == [A]
    assert plan.take(5.0) == []
    assert plan.standing(A) == "relayed; a direct connection is being tried"


def test_a_peer_that_cannot_be_reached_stays_relayed_says_why_and_is_tried_again_later():
    plan = Upgrades()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    assert plan.standing(A) == f"stays relayed after {ATTEMPTS} attempts: closed"
    assert plan.take(now + PAUSE_SECONDS - 1) == []
    assert plan.take(now + PAUSE_SECONDS) == [A]


def test_a_direct_connection_ends_it():
    plan = Upgrades()
    plan.relayed(A, 0.0)
    plan.take(0.0)
    plan.direct(A)
    assert not plan.failed(A, "too late", 1.0)
    assert (plan.standing(A), plan.take(100.0), plan.next_at()) == ("", [], float("inf"))


def test_a_peer_that_comes_back_does_not_start_anew():
    plan = Upgrades()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    plan.gone(A, now)
    assert plan.standing(A) == ""
    plan.relayed(A, now + 1)
    assert plan.take(now + 1) == []
    assert plan.standing(A).startswith("stays relayed")


def test_a_peer_that_is_gone_is_not_tried():
    plan = Upgrades()
    plan.relayed(A, 0.0)
    plan.gone(A, 0.0)
    assert plan.take(1.0) == []


def test_other_own_addresses_are_a_reason_to_try_again():
    plan = Upgrades()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    plan.again(now + 1)
    give_up(plan, A, now + 1)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(upgrades, "MAX_PEERS", 3)
    plan = Upgrades()
    for number in range(5):
        peer = PeerId(str(number))
        plan.relayed(peer, 10 * number)
        plan.gone(peer, give_up(plan, peer, 10 * number))
    assert repr(plan) == "<Upgrades 3 peers · 0 running>"

from __future__ import annotations

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.nat import upgrade_plan as upgrades
from swarmcore_transports.libp2p.nat.upgrade_plan import ATTEMPTS, BACKOFF_SECONDS, PAUSE_SECONDS, UpgradePlan

A, B = PeerId("a"), PeerId("b")


def give_up(plan: UpgradePlan, peer: PeerId, now: float) -> float:
    """Fail until the peer is left alone; when that is."""
    for backoff in BACKOFF_SECONDS:
        assert plan.take_due(now) == [peer]
        assert not plan.failed(peer, "closed", now)
        assert plan.next_change_at() == now + backoff
        now += backoff
    assert plan.take_due(now) == [peer]
    assert plan.failure_reasons() == []
    assert plan.failed(peer, "closed", now)
    assert plan.failure_reasons() == ["closed"]
    return now


def test_a_relayed_peer_is_tried_at_once_and_by_one_attempt_at_a_time():
    plan = UpgradePlan()
    plan.relayed(A, 5.0)
    assert plan.take_due(5.0) == [A]
    assert plan.take_due(5.0) == []
    assert plan.status(A) == "relayed; a direct connection is being tried"


def test_a_peer_that_cannot_be_reached_stays_relayed_says_why_and_is_tried_again_later():
    plan = UpgradePlan()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    assert plan.status(A) == f"stays relayed after {ATTEMPTS} attempts: closed"
    assert plan.take_due(now + PAUSE_SECONDS - 1) == []
    assert plan.take_due(now + PAUSE_SECONDS) == [A]


def test_a_direct_connection_ends_it():
    plan = UpgradePlan()
    plan.relayed(A, 0.0)
    plan.take_due(0.0)
    plan.direct(A)
    assert not plan.failed(A, "too late", 1.0)
    assert (plan.status(A), plan.take_due(100.0), plan.next_change_at()) == ("", [], float("inf"))


def test_a_peer_that_comes_back_does_not_start_anew():
    plan = UpgradePlan()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    plan.disconnected(A, now)
    assert plan.status(A) == ""
    plan.relayed(A, now + 1)
    assert plan.take_due(now + 1) == []
    assert plan.status(A).startswith("stays relayed")


def test_a_peer_that_is_gone_is_not_tried():
    plan = UpgradePlan()
    plan.relayed(A, 0.0)
    plan.disconnected(A, 0.0)
    assert plan.take_due(1.0) == []


def test_new_addresses_of_this_peer_are_a_reason_to_try_again():
    plan = UpgradePlan()
    plan.relayed(A, 0.0)
    now = give_up(plan, A, 0.0)
    plan.retry_all(now + 1)
    give_up(plan, A, now + 1)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(upgrades, "MAX_PEERS", 3)
    plan = UpgradePlan()
    for number in range(5):
        peer = PeerId(str(number))
        plan.relayed(peer, 10 * number)
        plan.disconnected(peer, give_up(plan, peer, 10 * number))
    assert repr(plan) == "<UpgradePlan 3 peers · 0 running>"

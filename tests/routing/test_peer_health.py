"""Who is banned, for how long, and what forgives."""

from __future__ import annotations

import attrs
import pytest
from announced import peer, server

from swarmcore.registry.base import Change
from swarmcore.routing.health import MISSED_PINGS, PeerHealth
from swarmcore.types import Span

ONE = peer(1)


def test_a_failure_bans_for_five_seconds() -> None:
    health = PeerHealth()
    health.failed(ONE, 100, "broke off")
    ban = health.banned(100)[ONE]
    assert (ban.until, ban.failures, ban.reason) == (105, 1, "broke off")
    assert health.banned(104.9)
    assert not health.banned(105)


def test_each_further_failure_doubles_the_ban_up_to_ten_minutes() -> None:
    health = PeerHealth()
    now, lengths = 0.0, []
    for _ in range(10):
        health.failed(ONE, now, "broke off")
        lengths.append(health.banned(now)[ONE].until - now)
        now = health.banned(now)[ONE].until
    assert lengths == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_failures_of_many_sessions_at_once_count_as_one() -> None:
    health = PeerHealth()
    for _ in range(20):
        health.failed(ONE, 0.5, "broke off")
    assert health.banned(1)[ONE].until == 5.5


def test_a_success_and_a_long_peace_forgive() -> None:
    health = PeerHealth()
    health.failed(ONE, 0, "broke off")
    health.succeeded(ONE)
    assert not health.banned(0)
    health.failed(ONE, 10, "broke off")
    health.failed(ONE, 15 + 601, "broke off")
    assert health.banned(616)[ONE].failures == 1


@pytest.mark.parametrize(
    ("fields", "forgiven"),
    [
        ({"incarnation": 7}, True),
        ({"state": "draining"}, True),
        ({"span": Span(3, 4)}, True),
        ({"addresses": ("tcp://elsewhere:1/x",)}, True),
        ({"queue_seconds": 3.0, "cache_tokens_free": 1, "sessions": 4}, False),
    ],
)
def test_an_announcement_forgives_when_it_says_that_something_is_different(fields, forgiven) -> None:
    health = PeerHealth()
    health.update(Change("joined", server(1, 0, 12)), 0)
    health.failed(ONE, 1, "broke off")
    health.update(Change("updated", attrs.evolve(server(1, 0, 12), **fields)), 2)
    assert (ONE not in health.banned(2)) == forgiven


def test_one_that_left_and_joins_again_is_forgiven() -> None:
    health = PeerHealth()
    health.update(Change("joined", server(1, 0, 12)), 0)
    health.failed(ONE, 1, "broke off")
    health.update(Change("left", server(1, 0, 12)), 2)
    assert health.banned(2)
    health.update(Change("joined", server(1, 0, 12)), 3)
    assert not health.banned(3)


def test_a_lost_ping_bans_nobody_and_three_in_a_row_do() -> None:
    health = PeerHealth()
    for _ in range(MISSED_PINGS - 1):
        health.missed(ONE, 0, "no answer")
    health.answered(ONE)
    for _ in range(MISSED_PINGS - 1):
        health.missed(ONE, 0, "no answer")
    assert not health.banned(0)
    health.missed(ONE, 0, "no answer")
    assert health.banned(0)
    health.answered(ONE)
    assert not health.banned(0)


def test_an_answered_ping_does_not_make_up_for_failed_work() -> None:
    health = PeerHealth()
    health.failed(ONE, 0, "computes nonsense")
    health.answered(ONE)
    assert health.banned(0)


def test_the_memory_is_bounded_and_keeps_the_bans_that_last() -> None:
    health = PeerHealth(capacity=3)
    for n in range(10):
        health.failed(peer(n), n, "broke off")
    assert sorted(health.banned(9)) == [peer(7), peer(8), peer(9)]

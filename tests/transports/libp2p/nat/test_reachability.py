from __future__ import annotations

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from multiaddr import Multiaddr

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.nat.autonat import (
    ANSWERS_WANTED,
    ASK_AGAIN_SECONDS,
    EXPIRY_SECONDS,
    SILENCE_SECONDS,
    Reachability,
)

ONE, OTHER = Multiaddr("/ip4/11.0.0.1/tcp/4001"), Multiaddr("/ip4/11.0.0.1/tcp/4002")
A, B, C, D, E = map(PeerId, "abcde")


def test_nothing_is_known_before_anybody_has_tried():
    reachability = Reachability()
    assert reachability.is_reachable(0) is None
    reachability.no_answer(A, 0)
    assert reachability.is_reachable(0) is None


def test_an_address_that_was_reached_is_verified_and_one_that_was_not_is_not():
    reachability = Reachability()
    reachability.answered(A, [ONE, OTHER], [ONE], 0)
    assert reachability.verified(0) == [ONE]
    assert reachability.is_reachable(0) is True


def test_nobody_who_tried_got_through():
    reachability = Reachability()
    reachability.answered(A, [ONE], [], 0)
    assert reachability.is_reachable(0) is False


def test_one_liar_among_three_changes_no_verdict():
    for lie, truth in (([ONE], []), ([], [ONE])):
        reachability = Reachability()
        reachability.answered(A, [ONE], lie, 0)
        reachability.answered(B, [ONE], truth, 0)
        reachability.answered(C, [ONE], truth, 0)
        assert reachability.is_reachable(0) is bool(truth)


def test_addresses_that_were_not_asked_about_do_not_count():
    reachability = Reachability()
    reachability.answered(A, [ONE], [ONE, OTHER], 0)
    assert reachability.verified(0) == [ONE]


def test_as_many_peers_are_asked_as_answers_are_missing():
    reachability = Reachability()
    assert reachability.to_ask([A, B, C, D, E], 0) == [A, B, C][:ANSWERS_WANTED]
    reachability.answered(A, [ONE], [ONE], 0)
    reachability.no_answer(B, 0)
    assert reachability.to_ask([A, B, C, D, E], 1) == [C, D]
    assert reachability.to_ask([A, B], 1) == []


def test_peers_are_asked_again_after_a_while_and_new_ones_first():
    reachability = Reachability()
    for peer in (A, B, C):
        reachability.answered(peer, [ONE], [ONE], 0)
    assert reachability.to_ask([A, B, C, D], ASK_AGAIN_SECONDS - 1) == []
    assert reachability.next_change_at(0) == ASK_AGAIN_SECONDS
    assert reachability.to_ask([A, B, C, D], ASK_AGAIN_SECONDS) == [D, A, B]


def test_answers_expire_and_silent_peers_are_tried_once_more():
    reachability = Reachability()
    reachability.answered(A, [ONE], [ONE], 0)
    reachability.no_answer(B, 0)
    assert reachability.verified(EXPIRY_SECONDS - 1) == [ONE]
    assert reachability.is_reachable(EXPIRY_SECONDS) is None
    assert B not in reachability.to_ask([B], SILENCE_SECONDS - 1)
    assert B in reachability.to_ask([B], SILENCE_SECONDS)


def test_other_addresses_make_all_answers_void():
    reachability = Reachability()
    reachability.answered(A, [ONE], [ONE], 0)
    reachability.clear()
    assert reachability.is_reachable(1) is None
    assert reachability.to_ask([A], 1) == [A]

from __future__ import annotations

from collections.abc import Callable

import attrs

from swarmcore.identity import Identity
from swarmcore.registry.gossip.suspicion import (
    BURST,
    LONGEST_MUTE,
    MAX_ACCUSERS,
    REFILL,
    SHORTEST_MUTE,
    Credibility,
    Suspected,
)
from swarmcore.types import PeerId

IdentityOf = Callable[[int], Identity]
WHO = PeerId("who")


def test_a_suspicion_is_signed_by_its_accuser(identity_of: IdentityOf) -> None:
    suspected = Suspected.sign(identity_of(1), identity_of(2).peer, 7)
    assert suspected.is_signed()
    assert not attrs.evolve(suspected, sequence=8).is_signed()
    assert not attrs.evolve(suspected, peer=identity_of(3).peer).is_signed()
    assert not attrs.evolve(suspected, by=identity_of(3).peer).is_signed()
    assert not attrs.evolve(suspected, by=PeerId("nobody"), signature=b"").is_signed()


def test_credit_is_spent_and_comes_back() -> None:
    credibility = Credibility()
    assert [credibility.spend(WHO, 5.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    assert credibility.spend(PeerId("other"), 5.0)
    assert sum(credibility.spend(WHO, 5.0 + REFILL / 2) for _ in range(BURST)) == BURST // 2
    assert sum(credibility.spend(WHO, 1000.0) for _ in range(2 * BURST)) == BURST


def test_who_is_wrong_is_not_heard_for_longer_each_time() -> None:
    credibility, now, waits = Credibility(), 0.0, []
    for _ in range(10):
        credibility.was_wrong([WHO], now)
        started = now
        while not credibility.believes(WHO, now):
            assert not credibility.spend(WHO, now)
            now += 1.0
        waits.append(now - started)
    assert waits[:3] == [SHORTEST_MUTE, 2 * SHORTEST_MUTE, 4 * SHORTEST_MUTE]
    assert waits[-1] == LONGEST_MUTE


def test_an_error_long_ago_is_forgiven() -> None:
    credibility = Credibility()
    credibility.was_wrong([WHO], 0.0)
    credibility.was_wrong([WHO], 1000.0)
    assert credibility.believes(WHO, 1000.0 + SHORTEST_MUTE)


def test_a_bounded_number_of_accusers_is_remembered() -> None:
    credibility = Credibility()
    for number in range(MAX_ACCUSERS + 10):
        credibility.spend(PeerId(str(number)), 0.0)
    assert len(credibility) == MAX_ACCUSERS

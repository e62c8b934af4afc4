from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from swarmcore.identity import Identity
from swarmcore.registry.base import Change
from swarmcore.registry.gossip.members import REMEMBERED, Members, group_by_peer
from swarmcore.types import Address, ServerInfo

IdentityOf = Callable[[int], Identity]


@pytest.fixture
def info_of(identity_of: IdentityOf) -> Callable[..., ServerInfo]:
    def info(number: int, port: int = 1) -> ServerInfo:
        peer = identity_of(number).peer
        return ServerInfo(peer, (f"tcp://192.0.2.{number % 256}:{port}/{peer}",))

    return info


InfoOf = Callable[..., ServerInfo]


def joined(members: Members, *infos: ServerInfo) -> None:
    for info in infos:
        members.update(Change("joined", info))


def test_choices_are_different_live_peers_and_spread_over_all(info_of: InfoOf) -> None:
    members = Members(info_of(99).peer, [], Random(1))
    infos = [info_of(n) for n in range(1, 11)]
    joined(members, info_of(99), *infos)
    seen = set()
    for _ in range(100):
        chosen = [member.peer for member in members.choose(3, now=0.0)]
        assert len(set(chosen)) == 3
        seen.update(chosen)
    assert seen == {info.peer for info in infos}  # oneself is not among them


def test_bootstrap_peers_count_before_they_announce_themselves(info_of: InfoOf) -> None:
    typed = [Address.parse(info_of(n).addresses[0]) for n in (1, 2, 99)]
    members = Members(info_of(99).peer, typed, Random(1))
    assert {p.peer for p in members.choose(5, 0.0)} == {info_of(1).peer, info_of(2).peer}
    joined(members, info_of(1, port=7))
    (moved,) = [p for p in members.choose(5, 0.0) if p.peer == info_of(1).peer]
    assert [str(a) for a in moved.addresses] == [info_of(1, port=7).addresses[0], info_of(1).addresses[0]]


def test_a_peer_in_trouble_is_left_alone_for_longer_and_longer(info_of: InfoOf) -> None:
    members = Members(info_of(99).peer, [], Random(1), backoff=5.0, max_backoff=12.0)
    joined(members, info_of(1))
    peer = info_of(1).peer
    members.failed(peer, now=0.0)
    assert not members.choose(1, now=4.9)
    assert members.choose(1, now=5.0)
    members.failed(peer, now=5.0)
    assert not members.choose(1, now=14.9)
    for _ in range(50):
        members.failed(peer, now=20.0)
    assert members.choose(1, now=32.0)
    members.failed(peer, now=32.0)
    members.answered(peer)
    assert members.choose(1, now=32.0)


def test_a_peer_that_moves_is_tried_again_at_once(info_of: InfoOf) -> None:
    members = Members(info_of(99).peer, [], Random(1))
    joined(members, info_of(1))
    members.failed(info_of(1).peer, now=0.0)
    members.update(Change("updated", info_of(1)))
    assert not members.choose(1, now=1.0)
    members.update(Change("updated", info_of(1, port=2)))
    assert members.choose(1, now=1.0)


def test_the_last_ones_lost_are_remembered(info_of: InfoOf) -> None:
    members = Members(info_of(999).peer, [Address.parse(info_of(500).addresses[0])], Random(1))
    for n in range(1, REMEMBERED + 11):
        joined(members, info_of(n))
        members.update(Change("left", info_of(n)))
        members.failed(info_of(n).peer, now=0.0)
    assert [p.peer for p in members.choose(9, 0.0)] == [info_of(500).peer]
    found = set()
    while lost := members.choose_lost(now=100.0):
        found.add(lost.peer)
        members.failed(lost.peer, now=100.0)
    assert found == {info_of(n).peer for n in (*range(11, REMEMBERED + 11), 500)}
    assert repr(members) == f"<Members 0 live · {REMEMBERED} lost · {REMEMBERED + 1} backing off>"


def test_who_comes_back_is_not_lost(info_of: InfoOf) -> None:
    members = Members(info_of(99).peer, [], Random(1))
    joined(members, info_of(1))
    members.update(Change("left", info_of(1)))
    assert not members.choose(1, 0.0)
    joined(members, info_of(1))
    assert members.choose(1, 0.0)
    assert members.choose_lost(0.0) is None


def test_addresses_of_one_peer_go_together(info_of: InfoOf) -> None:
    addresses = [Address.parse(info_of(n, port).addresses[0]) for n, port in ((1, 1), (2, 1), (1, 2))]
    grouped = group_by_peer(addresses)
    assert [(p.peer, len(p.addresses)) for p in grouped] == [(info_of(1).peer, 2), (info_of(2).peer, 1)]

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from swarmcore.registry.gossip.digest import key_of
from swarmcore.registry.gossip.heartbeats import Ring
from swarmcore.types import PeerId

PEERS = [PeerId(str(number)) for number in range(20)]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(PEERS))), st.integers(0, 4))
def test_successors_are_those_of_a_sorted_list(steps: list[tuple[bool, PeerId]], count: int) -> None:
    ring, members = Ring(PEERS[0]), set()
    for joins, peer in steps:
        if joins:
            ring.add(peer)
            members.add(peer)
        else:
            ring.discard(peer)
            members.discard(peer)
    order = sorted(members - {PEERS[0]}, key=lambda peer: (key_of(peer) < key_of(PEERS[0]), key_of(peer)))
    assert ring.successors(count) == order[:count]
    assert ring.successors(count, order[:1]) == order[1 : 1 + count]
    assert len(ring) == len(order)


def test_everyone_is_watched_by_two() -> None:
    watched: Counter[PeerId] = Counter()
    for own in PEERS:
        ring = Ring(own)
        for peer in PEERS:
            ring.add(peer)
        watched.update(ring.successors(2))
    assert watched == dict.fromkeys(PEERS, 2)

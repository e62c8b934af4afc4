"""What sessions keep beside the cache stays within its budget, and within a share for each peer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcore.server.kept_memory import KeptMemory
from swarmcore.types import PeerId

ANN, BOB = PeerId("ann"), PeerId("bob")


def test_the_peer_that_keeps_most_loses_what_grew_least_recently():
    lost = []
    memory = KeptMemory(100)
    first = memory.open(ANN, lambda: lost.append("first"))
    second = memory.open(ANN, lambda: lost.append("second"))
    modest = memory.open(BOB, lambda: lost.append("modest"))
    memory.resize(modest, 40)
    memory.resize(first, 30)
    memory.resize(second, 25)
    memory.resize(first, 35)
    assert lost == []
    memory.resize(modest, 45)
    assert lost == ["second"]
    assert memory.nbytes == 80
    assert memory.dropped == 1


def test_what_is_larger_than_the_budget_is_not_kept():
    lost = []
    memory = KeptMemory(100)
    keeping = memory.open(ANN, lambda: lost.append("it"))
    memory.resize(keeping, 101)
    assert lost == ["it"]
    assert memory.nbytes == 0
    memory.close(keeping)
    assert memory.nbytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 120)), max_size=60))
def test_the_budget_is_never_exceeded_and_an_equal_share_is_never_taken(changes):
    memory = KeptMemory(100)
    peers = [PeerId(str(number // 2)) for number in range(6)]
    sizes = [0] * 6

    def dropping(number):
        def drop():
            assert sum(size for at, size in enumerate(sizes) if peers[at] == peers[number]) > 100 / 3
            sizes[number] = 0

        return drop

    keepings = [memory.open(peer, dropping(number)) for number, peer in enumerate(peers)]
    for number, size in changes:
        sizes[number] = size
        memory.resize(keepings[number], size)
        assert memory.nbytes == sum(sizes) <= 100
        assert [keeping.nbytes for keeping in keepings] == sizes
    for keeping in keepings:
        memory.close(keeping)
    assert memory.nbytes == 0

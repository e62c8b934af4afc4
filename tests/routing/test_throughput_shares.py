"""Work in proportion to throughput, at any moment, whoever joins and leaves."""

from __future__ import annotations

from collections import Counter
from random import Random

import attrs
import pytest
from announced import MODEL, WHOLE, peer, server
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InputError, MissingBlocksError
from swarmcore.routing.shares import ThroughputShares
from swarmcore.types import PeerId


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=8))
def test_any_two_servers_are_never_further_apart_than_one_piece_of_work(throughputs: list[float]) -> None:
    shares = ThroughputShares(MODEL)
    for n, throughput in enumerate(throughputs):
        shares.add(server(n, 0, 12), throughput)
    done = Counter[PeerId]()
    for _ in range(200):
        done.update(shares.next_chain(WHOLE).peers)
        seconds = [(done[peer(n)] / t, 1 / t) for n, t in enumerate(throughputs)]
        for a, step_a in seconds:
            for b, step_b in seconds:
                assert abs(a - b) <= max(step_a, step_b) * (1 + 1e-9)


@given(st.randoms(use_true_random=False))
def test_servers_that_come_and_go_share_evenly_while_they_are_together(rng: Random) -> None:
    shares = ThroughputShares(MODEL)
    throughputs = {n: rng.uniform(1, 20) for n in range(3)}
    slowest = min(throughputs.values())
    for n, throughput in throughputs.items():
        shares.add(server(n, 0, 12), throughput)
    for n in range(3, 9):
        if rng.random() < 0.5 and len(throughputs) > 1:
            gone = rng.choice(sorted(throughputs))
            del throughputs[gone]
            shares.remove(peer(gone))
        throughputs[n] = rng.uniform(1, 20)
        slowest = min(slowest, throughputs[n])
        shares.add(server(n, 0, 12), throughputs[n])
        done = Counter[PeerId]()
        for _ in range(rng.randrange(100)):
            done.update(shares.next_chain(WHOLE).peers)
            # Two at most: one for where they began, maybe beside one that has left; one for where they are.
            slack = 2 / slowest * (1 + 1e-9)
            seconds = [done[peer(m)] / t for m, t in throughputs.items()]
            assert max(seconds) - min(seconds) <= slack


def test_work_is_spread_in_time() -> None:
    shares = ThroughputShares(MODEL)
    shares.add(server(1, 0, 12), 2)
    shares.add(server(2, 0, 12), 1)
    order = "".join(shares.next_chain(WHOLE).peers[0][-1] for _ in range(9))
    assert order.count("1") == 6
    assert "111" not in order


def test_each_stage_shares_by_itself() -> None:
    shares = ThroughputShares(MODEL)
    for n, throughput in ((1, 3), (2, 1)):
        shares.add(server(n, 0, 6), throughput)
    shares.add(server(3, 6, 12), 5)
    done = Counter(p for _ in range(40) for p in shares.next_chain(WHOLE).peers)
    assert done == {peer(1): 30, peer(2): 10, peer(3): 40}


def test_a_new_throughput_counts_from_then_on() -> None:
    shares = ThroughputShares(MODEL)
    shares.add(server(1, 0, 12), 1)
    shares.add(server(2, 0, 12), 1)
    Counter(shares.next_chain(WHOLE).peers for _ in range(100))
    shares.add(server(2, 0, 12), 3)
    done = Counter(p for _ in range(40) for p in shares.next_chain(WHOLE).peers)
    assert done[peer(2)] == pytest.approx(30, abs=1)


def test_it_follows_a_view() -> None:
    shares = ThroughputShares(MODEL)
    shares.follow([server(1, 0, 12, throughput=9.0), server(2, 0, 12), server(3, 0, 12, throughput=3.0)])
    done = Counter(p for _ in range(50) for p in shares.next_chain(WHOLE).peers)
    assert (done[peer(1)], done[peer(2)], done[peer(3)]) == (30, 10, 10)
    shares.follow([server(1, 0, 12, throughput=9.0, state="draining"), server(2, 0, 12)])
    assert shares.next_chain(WHOLE).peers == (peer(2),)


def test_what_cannot_be_shared_is_refused() -> None:
    shares = ThroughputShares(MODEL)
    with pytest.raises(InputError):
        shares.add(attrs.evolve(server(1, 0, 12), span=None), 1)
    with pytest.raises(InputError):
        shares.add(server(1, 0, 12), 0)
    shares.add(server(1, 0, 6), 1)
    with pytest.raises(MissingBlocksError, match="block 6"):
        shares.next_chain(WHOLE)

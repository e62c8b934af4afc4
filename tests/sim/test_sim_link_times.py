"""The table of codecs by link: lossless where the link is fast, several times as fast where it is slow."""

from __future__ import annotations

import pytest

from swarmcore.sim.link_times import MicroBatch, link_times


def test_fast_links_lose_nothing_and_slow_ones_are_several_times_as_fast() -> None:
    slowest, slow, fast, fastest = link_times()
    assert fastest.codecs == {"activations": "raw", "gradients": "raw"}
    assert fastest.auto == pytest.approx(fastest.raw)
    assert fast.codecs["activations"] in ("raw", "int8") and fast.auto < fast.raw * 1.001
    assert slow.raw > 4 * slow.auto
    assert slowest.raw > 5 * slowest.auto
    assert slowest.auto < slowest.fixed
    # Faster links lose no more than slower ones.
    assert slowest.auto > slow.auto > fast.auto > fastest.auto


def test_a_server_that_computes_for_long_hides_more() -> None:
    work = MicroBatch(forward_seconds=10, backward_seconds=20)
    (slow,) = link_times([10], work=work)
    assert slow.codecs == {"activations": "raw", "gradients": "raw"}


def test_a_slow_link_in_the_chain_does_not_change_what_the_others_do() -> None:
    alone = link_times([100])
    assert link_times([1, 100, 1000])[1].codecs == alone[0].codecs

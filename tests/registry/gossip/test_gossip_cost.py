"""The figures in the documentation come from this; its bounds keep them from growing unnoticed."""

from __future__ import annotations

from swarmcore.bench.gossip import measure
from swarmcore.testing import clock


def test_what_gossip_costs_ten_members() -> None:
    cost = clock.run(measure(10))
    assert cost.most_know < 0.5
    assert cost.all_know < 10.0
    assert cost.killed < 1.0
    assert cost.hung < 5.0
    assert cost.calls < 0.3
    assert cost.rate < 1000

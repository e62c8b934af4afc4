from __future__ import annotations

import pytest
from announced import peer

from swarmcore.routing.costs import Latencies


def test_measurements_are_smoothed() -> None:
    latencies = Latencies(weight=0.25)
    latencies.measured(peer(1), 0.1, now=0)
    latencies.measured(peer(1), 0.2, now=1)
    assert latencies.seconds[peer(1)] == pytest.approx(0.125)


def test_the_age_is_that_of_the_last_measurement() -> None:
    latencies = Latencies()
    assert latencies.age(peer(1), 5) == float("inf")
    latencies.measured(peer(1), 0.1, now=0)
    latencies.measured(peer(1), 0.1, now=3)
    assert latencies.age(peer(1), 5) == 2
    latencies.forget(peer(1))
    assert latencies.age(peer(1), 5) == float("inf")


def test_the_one_measured_longest_ago_makes_room() -> None:
    latencies = Latencies(capacity=2)
    for now, n in enumerate((1, 2, 1, 3)):
        latencies.measured(peer(n), 0.1, now)
    assert set(latencies.seconds) == {peer(1), peer(3)}

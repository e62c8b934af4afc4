"""Speeds of servers, as announced and as measured."""

from __future__ import annotations

import pytest
from announced import peer, server

from swarmcore.client.autograd.planner import BACKWARD, CAPACITY, ServerSpeeds

FAST = server(1, 0, 12, forward_rps=100)
SLOW = server(2, 0, 6, forward_rps=100)
SILENT = server(3, 0, 12)


def test_until_they_are_measured_they_are_as_fast_as_they_say() -> None:
    found = ServerSpeeds().seconds([FAST, SLOW, SILENT], "forward")
    assert found == pytest.approx({peer(1): 1 / 1200, peer(2): 1 / 600, peer(3): 1 / 600})
    both = ServerSpeeds().seconds([FAST], "both")
    assert both[peer(1)] == pytest.approx((1 + BACKWARD) / 1200)
    assert ServerSpeeds().seconds([SILENT], "both") == {peer(3): 1.0}


def test_forward_and_backward_are_measured_apart() -> None:
    speeds = ServerSpeeds()
    speeds.worked(FAST, "forward", 10, 12, 12.0)
    speeds.worked(FAST, "backward", 10, 12, 24.0)
    speeds.worked(FAST, "backward", 10, 12, float("nan"))
    for work, seconds in (("forward", 0.1), ("backward", 0.2), ("both", 0.3)):
        assert speeds.seconds([FAST], work)[peer(1)] == pytest.approx(seconds)  # type: ignore[arg-type]


def test_announcements_count_beside_measurements_as_far_as_they_are_right() -> None:
    speeds = ServerSpeeds()
    speeds.worked(FAST, "forward", 100, 12, 4.0)  # four times what it says
    speeds.worked(FAST, "backward", 100, 12, 8.0)
    found = speeds.seconds([FAST, SLOW], "both")
    assert found[peer(2)] == pytest.approx(2 * found[peer(1)])


def test_only_so_many_are_remembered() -> None:
    speeds = ServerSpeeds()
    for n in range(CAPACITY + 5):
        speeds.worked(server(n, 0, 12), "forward", 1, 1, 1.0)
    assert len(speeds) == CAPACITY

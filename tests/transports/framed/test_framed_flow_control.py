from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import ProtocolError
from swarmcore_transports.framed.flow_control import (
    MESSAGE_COST,
    MIN_PROGRESS,
    STALL_SECONDS,
    ReceiveQueue,
    StallDetector,
    window_for,
)

WINDOW = 16 * 1024


def put(queue: ReceiveQueue, size: int) -> None:
    queue.charge(size, total=size)
    queue.put(memoryview(bytearray(size)))


def test_a_sender_beyond_its_credit_is_refused() -> None:
    queue = ReceiveQueue(WINDOW)
    put(queue, 1000)
    with pytest.raises(ProtocolError, match="more than it was granted"):
        for _ in range(20):
            put(queue, 1000)


def test_a_flood_of_empty_messages_is_bounded() -> None:
    queue = ReceiveQueue(WINDOW)
    with pytest.raises(ProtocolError):
        for _ in range(10_000):
            put(queue, 0)
            queue.grant()
    assert len(queue) <= WINDOW // MESSAGE_COST + 1


def test_a_message_that_was_admitted_may_be_larger_than_the_window() -> None:
    queue = ReceiveQueue(WINDOW)
    granted = WINDOW
    for part in range(100):
        cost = 4096 + (MESSAGE_COST if part == 0 else 0)
        assert granted >= cost
        queue.charge(4096, total=409_600 if part == 0 else None)
        if part == 0:
            assert queue.to_admit == 409_600
            queue.admit()
        assert queue.to_admit == 0
        granted += queue.grant() - cost
    queue.put(memoryview(bytearray(409_600)))
    assert len(queue) == 1


def test_a_message_that_was_not_admitted_stops_at_the_window() -> None:
    queue = ReceiveQueue(WINDOW)
    queue.charge(WINDOW - MESSAGE_COST, total=10 * WINDOW)
    assert queue.grant() == 0
    assert not queue.sender_can_continue
    queue.admit()
    assert queue.sender_can_continue
    assert queue.grant() == WINDOW


def test_a_message_is_admitted_once_nothing_waits_in_front_of_it() -> None:
    queue = ReceiveQueue(WINDOW)
    put(queue, 100)
    queue.charge(1000, total=WINDOW)
    assert queue.to_admit == 0
    queue.take()
    assert queue.to_admit == WINDOW


def test_a_window_that_is_used_grows_as_far_as_there_is_room() -> None:
    queue = ReceiveQueue(WINDOW, 4 * WINDOW)
    put(queue, 1000)
    assert queue.window_growth == 0
    put(queue, WINDOW // 2)
    assert queue.window_growth == 3 * WINDOW
    queue.widen(3 * WINDOW)
    assert queue.grant() >= 3 * WINDOW
    assert queue.window_growth == 0
    long = ReceiveQueue(WINDOW, 4 * WINDOW)
    long.charge(1000, total=WINDOW)  # it will be used
    assert long.window_growth == 3 * WINDOW


def test_a_message_must_come_on() -> None:
    progress = StallDetector()
    assert not progress.stalled(0.0, 1, 10, due=True, under_pressure=False)
    assert not progress.stalled(STALL_SECONDS, 1, 20, due=True, under_pressure=False)
    assert progress.stalled(STALL_SECONDS + 1, 1, 30, due=True, under_pressure=False)
    assert not progress.stalled(STALL_SECONDS + 1, 2, 0, due=True, under_pressure=False)  # another message


def test_a_message_may_be_slow_unless_others_wait_for_room() -> None:
    slow = [(now, int(now * 2 * MIN_PROGRESS / STALL_SECONDS)) for now in range(0, 400, 5)]
    easy, hard = StallDetector(), StallDetector()
    assert not any(easy.stalled(now, 1, got, due=True, under_pressure=False) for now, got in slow)
    assert any(hard.stalled(now, 1, got, due=True, under_pressure=True) for now, got in slow)


def test_what_this_side_does_not_grant_is_not_held_against_the_sender() -> None:
    progress = StallDetector()
    assert not any(progress.stalled(now, 1, 10, due=False, under_pressure=True) for now in range(0, 400, 5))
    assert not progress.stalled(401, 1, 10, due=True, under_pressure=False)


def test_what_is_discarded_takes_no_room() -> None:
    queue = ReceiveQueue(WINDOW)
    queue.discard()
    put(queue, 1000)
    assert not queue


def test_the_window_has_a_least_size() -> None:
    assert window_for(1) == WINDOW


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6000)), max_size=200))
def test_credit_never_runs_dry_and_never_overflows(steps: list[tuple[bool, int]]) -> None:
    """An honest sender, and a reader that takes a message now and then: nothing is refused or stuck."""
    queue, credit, unread = ReceiveQueue(WINDOW), WINDOW, 0
    for send, size in steps:
        if send and credit >= size + MESSAGE_COST:
            credit -= size + MESSAGE_COST
            put(queue, size)
            unread += size
        elif queue:
            unread -= len(queue.take())
        credit += queue.grant()
        assert unread <= WINDOW + 6000
    while queue:
        queue.take()
    credit += queue.grant()
    assert 3 * WINDOW // 4 <= credit <= WINDOW

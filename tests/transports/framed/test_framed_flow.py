from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import ProtocolError
from swarmcore_transports.framed.flow import (
    LEAST_PROGRESS,
    MESSAGE_COST,
    PATIENCE,
    Inbox,
    Progress,
    window_for,
)

WINDOW = 16 * 1024


def put(inbox: Inbox, size: int) -> None:
    inbox.announce(size, total=size)
    inbox.put(memoryview(bytearray(size)))


def test_a_sender_beyond_its_credit_is_refused() -> None:
    inbox = Inbox(WINDOW)
    put(inbox, 1000)
    with pytest.raises(ProtocolError, match="more than it was granted"):
        for _ in range(20):
            put(inbox, 1000)


def test_a_flood_of_empty_messages_is_bounded() -> None:
    inbox = Inbox(WINDOW)
    with pytest.raises(ProtocolError):
        for _ in range(10_000):
            put(inbox, 0)
            inbox.grant()
    assert len(inbox) <= WINDOW // MESSAGE_COST + 1


def test_a_message_that_was_admitted_may_be_larger_than_the_window() -> None:
    inbox = Inbox(WINDOW)
    granted = WINDOW
    for part in range(100):
        cost = 4096 + (MESSAGE_COST if part == 0 else 0)
        assert granted >= cost
        inbox.announce(4096, total=409_600 if part == 0 else None)
        if part == 0:
            assert inbox.to_admit == 409_600
            inbox.admit()
        assert inbox.to_admit == 0
        granted += inbox.grant() - cost
    inbox.put(memoryview(bytearray(409_600)))
    assert len(inbox) == 1


def test_a_message_that_was_not_admitted_stops_at_the_window() -> None:
    inbox = Inbox(WINDOW)
    inbox.announce(WINDOW - MESSAGE_COST, total=10 * WINDOW)
    assert inbox.grant() == 0
    assert not inbox.sender_may_go_on
    inbox.admit()
    assert inbox.sender_may_go_on
    assert inbox.grant() == WINDOW


def test_a_message_is_admitted_once_nothing_waits_in_front_of_it() -> None:
    inbox = Inbox(WINDOW)
    put(inbox, 100)
    inbox.announce(1000, total=WINDOW)
    assert inbox.to_admit == 0
    inbox.take()
    assert inbox.to_admit == WINDOW


def test_a_window_that_is_used_grows_as_far_as_there_is_room() -> None:
    inbox = Inbox(WINDOW, 4 * WINDOW)
    put(inbox, 1000)
    assert inbox.widening == 0
    put(inbox, WINDOW // 2)
    assert inbox.widening == 3 * WINDOW
    inbox.widen(3 * WINDOW)
    assert inbox.grant() >= 3 * WINDOW
    assert inbox.widening == 0
    long = Inbox(WINDOW, 4 * WINDOW)
    long.announce(1000, total=WINDOW)  # it will be used
    assert long.widening == 3 * WINDOW


def test_a_message_must_come_on() -> None:
    progress = Progress()
    assert not progress.stalled(0.0, 1, 10, due=True, pressed=False)
    assert not progress.stalled(PATIENCE, 1, 20, due=True, pressed=False)
    assert progress.stalled(PATIENCE + 1, 1, 30, due=True, pressed=False)
    assert not progress.stalled(PATIENCE + 1, 2, 0, due=True, pressed=False)  # another message


def test_a_message_may_be_slow_unless_others_wait_for_room() -> None:
    slow = [(now, int(now * 2 * LEAST_PROGRESS / PATIENCE)) for now in range(0, 400, 5)]
    easy, hard = Progress(), Progress()
    assert not any(easy.stalled(now, 1, got, due=True, pressed=False) for now, got in slow)
    assert any(hard.stalled(now, 1, got, due=True, pressed=True) for now, got in slow)


def test_what_this_side_does_not_grant_is_not_held_against_the_sender() -> None:
    progress = Progress()
    assert not any(progress.stalled(now, 1, 10, due=False, pressed=True) for now in range(0, 400, 5))
    assert not progress.stalled(401, 1, 10, due=True, pressed=False)


def test_what_is_discarded_takes_no_room() -> None:
    inbox = Inbox(WINDOW)
    inbox.discard()
    put(inbox, 1000)
    assert not inbox


def test_the_window_has_a_least_size() -> None:
    assert window_for(1) == WINDOW


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6000)), max_size=200))
def test_credit_never_runs_dry_and_never_overflows(steps: list[tuple[bool, int]]) -> None:
    """An honest sender, and a reader that takes a message now and then: nothing is refused or stuck."""
    inbox, credit, unread = Inbox(WINDOW), WINDOW, 0
    for send, size in steps:
        if send and credit >= size + MESSAGE_COST:
            credit -= size + MESSAGE_COST
            put(inbox, size)
            unread += size
        elif inbox:
            unread -= len(inbox.take())
        credit += inbox.grant()
        assert unread <= WINDOW + 6000
    while inbox:
        inbox.take()
    credit += inbox.grant()
    assert 3 * WINDOW // 4 <= credit <= WINDOW

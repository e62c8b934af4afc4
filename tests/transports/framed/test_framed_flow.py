from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import ProtocolError
from swarmcore_transports.framed.flow import MESSAGE_COST, Inbox, window_for

WINDOW = 16 * 1024


def put(inbox: Inbox, size: int) -> None:
    inbox.announce(size, first=True)
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


def test_one_message_may_be_larger_than_the_window() -> None:
    inbox = Inbox(WINDOW)
    granted = WINDOW
    for part in range(100):
        cost = 4096 + (MESSAGE_COST if part == 0 else 0)
        assert granted >= cost
        inbox.announce(4096, first=part == 0)
        granted += inbox.grant() - cost
    inbox.put(memoryview(bytearray(409_600)))
    assert len(inbox) == 1


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

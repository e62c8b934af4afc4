"""Whose text is made next at a generation server."""

from __future__ import annotations

import pytest

from swarmcore.errors import BusyError
from swarmcore.head.queue import FIRST_GUESS, GenerationQueue, QueuedText
from swarmcore.types import PeerId

ANN, BEN, CLEO = PeerId("ann"), PeerId("ben"), PeerId("cleo")


def may_begin(*texts: QueuedText) -> list[bool]:
    return [text.may_begin.is_set() for text in texts]


def test_one_peer_leaves_a_place_for_another() -> None:
    queue = GenerationQueue(at_once=3, waiting=8)
    anns = [queue.enter(ANN) for _ in range(4)]
    assert may_begin(*anns) == [True, True, False, False]
    assert may_begin(queue.enter(BEN)) == [True]
    assert (queue.under_way, queue.queued) == (3, 2)


def test_one_place_alone_is_for_anybody() -> None:
    queue = GenerationQueue(at_once=1, waiting=8)
    first, second = queue.enter(ANN), queue.enter(ANN)
    assert may_begin(first, second) == [True, False]
    queue.leave(first, 2.0)
    assert may_begin(second) == [True]


def test_who_has_least_under_way_goes_next_with_its_oldest() -> None:
    queue = GenerationQueue(at_once=4, waiting=20)
    running = [queue.enter(ANN), queue.enter(ANN), queue.enter(BEN), queue.enter(BEN)]
    waiting = [queue.enter(peer) for peer in (ANN, ANN, BEN, CLEO)]
    queue.leave(running[3], 1.0)
    assert may_begin(*waiting) == [False, False, False, True], "cleo has none, though she came last"
    queue.leave(running[0], 1.0)
    assert may_begin(*waiting) == [True, False, False, True], "ann and ben have one each, and ann was first"


def test_the_line_is_bounded_and_half_of_it_for_one_peer() -> None:
    queue = GenerationQueue(at_once=1, waiting=4)
    queue.enter(ANN)
    queue.enter(ANN)
    queue.enter(ANN)
    with pytest.raises(BusyError, match="2 of them yours"):
        queue.enter(ANN)
    queue.enter(BEN)
    queue.enter(CLEO)
    with pytest.raises(BusyError) as refused:
        queue.enter(PeerId("dan"))
    assert refused.value.retry_after == 5 * FIRST_GUESS
    assert (queue.under_way, queue.queued) == (1, 4)


def test_who_gives_up_waiting_leaves_the_line() -> None:
    queue = GenerationQueue(at_once=1, waiting=4)
    first, second, third = queue.enter(ANN), queue.enter(BEN), queue.enter(CLEO)
    queue.leave(second)
    queue.leave(first, 4.0)
    assert may_begin(second, third) == [False, True]
    assert queue.retry_after < FIRST_GUESS, "the text that ended was shorter than was guessed"
    queue.leave(third)
    assert (queue.under_way, queue.queued) == (0, 0)

"""What a stream lets come in is reserved before, and given back when it was used."""

from __future__ import annotations

import pytest
from small_resources import bounded

from swarmcore.errors import ResourceLimitError
from swarmcore.resources import Bounds, Resource, ResourceManager
from swarmcore.types import PeerId
from swarmcore_transports.framed.flow_control import MESSAGE_COST, ReceiveMemory, ReceiveQueue

KIB = 1024
WINDOW, MOST = 64 * KIB, 256 * KIB
PEER = PeerId("peer")


class Sender:
    """One stream from the side of a sender that uses all the credit it gets."""

    def __init__(self, resources: ResourceManager, peer: PeerId = PEER) -> None:
        self.queue = ReceiveQueue(WINDOW, MOST)
        self.memory = ReceiveMemory(resources, peer, WINDOW, self.queue, self.more)
        self.credit = WINDOW
        self.left = 0
        self.total = 0

    def more(self) -> None:
        self.credit += self.queue.grant()

    def begin(self, total: int) -> None:
        self.total = self.left = total
        self._part(first=True)

    def go_on(self) -> bool:
        """Send what credit there is for; True when the message is whole."""
        while self.left and self._part(first=False):
            pass
        if not self.left and self.total:
            self.queue.put(memoryview(bytearray(self.total)))
            self.memory.message_arrived()
            self.total = 0
        return not self.left

    def _part(self, *, first: bool) -> bool:
        cost = MESSAGE_COST if first else 0
        length = min(self.left, self.credit - cost, WINDOW // 2)
        if length <= 0:
            return False
        self.credit -= length + cost
        self.left -= length
        self.queue.charge(length, total=self.total if first else None)
        self.memory.reserve()
        self.more()
        return True

    def take(self) -> None:
        self.memory.release_taken()
        self.queue.take()
        self.memory.message_taken()
        self.memory.reserve()
        self.more()


def budget(peer: int, system: int | None = None) -> ResourceManager:
    system = peer if system is None else system
    return bounded(bytes=Bounds(system, peer, unproven=KIB, protocol=system))


def test_unfinished_messages_of_many_streams_stay_within_the_bound_of_their_peer() -> None:
    resources = budget(8192 * KIB)
    senders = [Sender(resources) for _ in range(40)]
    for sender in senders:
        sender.begin(1024 * KIB)
    for _ in range(10):
        whole = [sender.go_on() for sender in senders]
        assert resources.used(Resource.BYTES, PEER) <= 8192 * KIB
    arrived = sum(1024 * KIB - sender.left for sender in senders)
    assert arrived <= 8192 * KIB
    assert sum(whole) >= 1  # those that were admitted came through
    for sender in senders:
        sender.memory.release()
    assert resources.used(Resource.BYTES) == 0


def test_every_message_gets_its_turn() -> None:
    resources = budget(4096 * KIB)
    senders = [Sender(resources) for _ in range(20)]
    for sender in senders:
        sender.begin(1024 * KIB)
    done = 0
    for _ in range(100):
        for sender in senders:
            if sender.go_on() and len(sender.queue):
                sender.take()
                sender.memory.release_taken()
                done += 1
    assert done == 20


def test_what_was_taken_counts_until_the_next_is_asked_for() -> None:
    resources = budget(4096 * KIB)
    sender = Sender(resources)
    sender.begin(1024 * KIB)
    assert sender.go_on()
    held = resources.used(Resource.BYTES)
    assert held >= 1024 * KIB
    sender.take()
    assert resources.used(Resource.BYTES) == held
    sender.memory.release_taken()
    assert resources.used(Resource.BYTES) == held - 1024 * KIB


def test_short_messages_need_no_more_than_the_window() -> None:
    resources = budget(WINDOW)
    sender = Sender(resources)
    for _ in range(1000):
        sender.begin(4 * KIB)
        assert sender.go_on()
        sender.take()
    assert resources.used(Resource.BYTES) == WINDOW


def test_a_peer_without_room_opens_no_stream_and_one_too_long_a_message_is_refused() -> None:
    resources = budget(2 * WINDOW)
    first, _ = Sender(resources), Sender(resources)
    with pytest.raises(ResourceLimitError):
        Sender(resources)
    with pytest.raises(ResourceLimitError, match="bound"):
        first.begin(10 * WINDOW)
    Sender(budget(WINDOW), PeerId("other"))


def test_one_peer_holds_up_no_other() -> None:
    resources = budget(8192 * KIB, 32_768 * KIB)
    for _ in range(40):
        Sender(resources).begin(2048 * KIB)
    other = Sender(resources, PeerId("other"))
    other.begin(2048 * KIB)
    assert other.go_on()

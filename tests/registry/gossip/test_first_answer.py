from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.members import AT_ONCE, STAGGER, Member, first_answer
from swarmcore.types import Address

pytestmark = pytest.mark.virtual_time


@pytest.fixture
def members(identity_of: Callable[[int], Identity]) -> list[Member]:
    peers = [identity_of(n).peer for n in range(1, 13)]
    return [Member(peer, (Address("tcp", f"//192.0.2.{n}:1", peer),)) for n, peer in enumerate(peers, 1)]


class Peers:
    """Answers after some seconds, or never; remembers what came of each attempt."""

    def __init__(self, members: list[Member], delays: list[float | None]) -> None:
        self.delays = dict(zip(members, delays, strict=False))
        self.running = self.most = 0
        self.disposed: list[Member] = []

    async def attempt(self, member: Member) -> Member:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            delay = self.delays[member]
            await asyncio.sleep(30.0 if delay is None else delay)
            if delay is None:
                raise PeerUnreachableError("no answer")
            return member
        finally:
            self.running -= 1


async def test_a_silent_peer_costs_only_its_head_start(members: list[Member]) -> None:
    peers = Peers(members, [None, 0.1])
    assert await first_answer(members[:2], peers.attempt) == members[1]
    assert asyncio.get_running_loop().time() == pytest.approx(STAGGER + 0.1)
    assert peers.running == 0


async def test_attempts_at_once_are_bounded_and_all_failures_are_named(members: list[Member]) -> None:
    peers = Peers(members, [None] * 12)
    with pytest.raises(PeerUnreachableError) as raised:
        await first_answer(members, peers.attempt)
    assert peers.most == AT_ONCE
    for member in members:
        assert f"{member.addresses[0]} (no answer)" in raised.value.message


async def test_a_second_answer_is_disposed_of(members: list[Member]) -> None:
    peers = Peers(members, [STAGGER + 1.0, 1.0])
    answer = await first_answer(members[:2], peers.attempt, dispose=peers.disposed.append)
    assert {answer, *peers.disposed} <= set(members[:2])
    assert len(peers.disposed) <= 1
    assert answer not in peers.disposed


async def test_cancelling_ends_all_attempts(members: list[Member]) -> None:
    peers = Peers(members, [None] * 3)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await first_answer(members[:3], peers.attempt)
    assert peers.running == 0

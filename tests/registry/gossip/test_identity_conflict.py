"""Two processes with one identity: one of them is shown, and the other as soon as that one is gone."""

from __future__ import annotations

import asyncio
import logging

import attrs
import pytest

from swarmcore.registry.base import Registry
from swarmcore.registry.gossip.identity_conflict import IdentityConflict, Resolution
from swarmcore.registry.gossip.records import Announcement
from swarmcore.testing.gossip import GossipSwarm
from swarmcore.testing.registry_contract import Member
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

ME = PeerId("me")
MODEL = ModelInfo("m", "f" * 64, 12, 8)


def info(incarnation: int, place: str) -> ServerInfo:
    return ServerInfo(ME, (f"memory://{place}/me",), incarnation=incarnation)


def test_the_one_that_was_started_last_is_shown() -> None:
    conflict = IdentityConflict()
    conflict.announced(100)
    assert conflict.note == ""
    assert (
        conflict.resolve(Announcement(ME, 101, 300, info(1, "old")), info(2, "here")) is Resolution.ANNOUNCE
    )
    assert "memory://old/me: this one is shown" in conflict.note
    assert (
        conflict.resolve(Announcement(ME, 102, 300, info(3, "new")), info(2, "here")) is Resolution.STEP_BACK
    )
    assert "memory://new/me: it is shown to the swarm and this one is not" in conflict.note
    assert conflict.resolve(Announcement(ME, 103, 300, None), info(2, "here")) is Resolution.ANNOUNCE
    assert conflict.note == ""


def test_a_record_from_before_the_start_is_nobody_elses() -> None:
    conflict = IdentityConflict()
    assert conflict.resolve(Announcement(ME, 90, 300, info(3, "old")), info(2, "here")) is Resolution.ANNOUNCE
    conflict.announced(100)
    assert conflict.resolve(Announcement(ME, 99, 300, info(3, "old")), info(2, "here")) is Resolution.ANNOUNCE
    assert conflict.note == ""


class Twins:
    """Two others, and two processes with one identity, the second started later."""

    def __init__(self, swarm: GossipSwarm, others: list[Member], twins: list[Member]) -> None:
        self.swarm, self.others, self.twins = swarm, others, twins

    @property
    def shown(self) -> set[tuple[str, ...] | None]:
        """Where the others take the peer to be."""
        peer = self.twins[0].identity.peer
        found = [other.registry.view().servers.get(peer) for other in self.others]
        return {None if each is None else each.addresses for each in found}

    async def until(self, addresses: tuple[str, ...], seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while self.shown != {addresses}:
                await asyncio.sleep(0.05)


async def announced(member: Member, incarnation: int) -> Member:
    registry: Registry = member.registry
    peer = member.identity.peer
    await registry.announce(
        ServerInfo(peer, member.addresses, "online", MODEL, Span(0, 6), incarnation=incarnation), 300
    )
    return member


async def twins(swarm: GossipSwarm, pause: float = 10.0) -> Twins:
    others = [await announced(await swarm.join(), 1) for _ in range(2)]
    first = await announced(await swarm.join(), 1)
    await asyncio.sleep(pause)
    nodes = swarm.nodes.pop(first.identity.peer), swarm.transports.pop(first.identity.peer)
    second = await announced(await swarm.join(first.identity, others[0].addresses), 2)
    both = Twins(swarm, others, [first, second])
    both.first_node, both.first_transport = nodes  # type: ignore[attr-defined]
    return both


@pytest.mark.virtual_time
async def test_the_later_one_is_shown_all_the_time_and_both_say_so(caplog: pytest.LogCaptureFixture) -> None:
    swarm = GossipSwarm()
    with caplog.at_level(logging.WARNING):
        both = await twins(swarm)
        first, second = both.twins
        await both.until(second.addresses, 8)
        for _ in range(200):
            await asyncio.sleep(0.5)
            assert both.shown == {second.addresses}
    assert "it is shown to the swarm and this one is not" in " ".join(first.registry.notes)
    assert first.addresses[0] in " ".join(second.registry.notes)
    lines = [record.message for record in caplog.records if "same identity" in record.message]
    assert len(lines) == 2, "one of each, not one for each record"
    await swarm.aclose()
    await first.registry.close()
    await both.first_node.close()  # type: ignore[attr-defined]


@pytest.mark.virtual_time
@pytest.mark.parametrize("how", ["withdraws", "is killed"])
@pytest.mark.parametrize("which", [0, 1])
async def test_when_one_is_gone_the_other_is_shown(how: str, which: int) -> None:
    swarm = GossipSwarm()
    both = await twins(swarm)
    first, second = both.twins
    await both.until(second.addresses, 8)
    await asyncio.sleep(10)
    gone, left = both.twins[which], both.twins[1 - which]
    if how == "withdraws":
        await gone.registry.withdraw()
        await gone.registry.close()
    if which == 1:
        await swarm.crash(second)
    else:
        await both.first_transport.crash()  # type: ignore[attr-defined]
        await first.registry.close()
        await both.first_node.close()  # type: ignore[attr-defined]
    await both.until(left.addresses, 8)
    for _ in range(100):
        await asyncio.sleep(0.5)
        assert both.shown == {left.addresses}
    # What it has to say meanwhile is taken as before.
    info = both.others[0].registry.view().servers[left.identity.peer]
    await left.registry.announce(attrs.evolve(info, sessions=3), 300)
    await asyncio.sleep(10)
    assert both.others[1].registry.view().servers[left.identity.peer].sessions == 3
    await swarm.aclose()
    if which == 1:
        await first.registry.close()
        await both.first_node.close()  # type: ignore[attr-defined]

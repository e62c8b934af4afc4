"""Clients whose clocks are wrong see the swarm all the same, and are member_time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import pytest

from swarmcore.registry.clock import SwarmClock, how_far_off
from swarmcore.registry.gossip.messages import RecordBatch
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.watch_server import _Watcher
from swarmcore.testing.gossip import GossipSwarm, faulty_memory

pytestmark = pytest.mark.virtual_time

HOUR, YEAR = 3600.0, 365.25 * 24 * 3600.0
OFF = [HOUR, -HOUR, 45.0, -200.0, 10 * YEAR, -50 * YEAR]


@pytest.fixture
async def swarm() -> AsyncIterator[GossipSwarm]:
    seldom = GossipOptions(heartbeat_interval=2.0)  # these tests last for hours, in virtual time
    async with aclosing(GossipSwarm(faulty_memory(Random(1)), options=seldom)) as swarm:
        yield swarm


@pytest.mark.parametrize("off", OFF)
async def test_a_client_sees_everyone_and_goes_on_seeing_them(
    swarm: GossipSwarm, off: float, caplog: pytest.LogCaptureFixture
) -> None:
    members = await swarm.announced(3, ttl=120.0)
    client = await swarm.watch(members[0].addresses, clock_off=off)
    everyone = [member.info() for member in members]
    await swarm.until_known(client, *everyone)
    changes = client.registry.changes()
    with pytest.raises(TimeoutError):  # nobody comes or goes
        async with asyncio.timeout(600.0):
            await anext(changes)
    await members[1].registry.withdraw()
    await swarm.until_known(client, everyone[0], everyone[2])
    await swarm.crash(members[0])
    await swarm.until_known(client, everyone[2])
    if abs(off) > 150:
        warnings = [record.message for record in caplog.records if "set the clock" in record.message]
        [warning] = warnings
        assert how_far_off(off) in warning


async def test_a_clock_that_is_right_is_gone_by_whatever_a_member_tells(swarm: GossipSwarm) -> None:
    members = await swarm.announced(3, ttl=120.0)
    swarm.clock_off[members[0].identity.peer] = HOUR
    client = await swarm.watch(members[0].addresses)
    await swarm.until_known(client, *(member.info() for member in members))
    assert not client.registry._clock.followed  # type: ignore[attr-defined]


async def test_a_clock_that_is_set_right_is_gone_by_again(swarm: GossipSwarm) -> None:
    [member] = await swarm.announced(1, ttl=120.0)
    client = await swarm.watch(member.addresses, clock_off=-HOUR)
    assert client.registry._clock.followed  # type: ignore[attr-defined]
    swarm.clock_off[client.identity.peer] = 0.0
    await asyncio.sleep(200.0)
    assert not client.registry._clock.followed  # type: ignore[attr-defined]
    await swarm.until_known(client, member.info())


@pytest.mark.parametrize("off", [HOUR, -HOUR])
async def test_a_clock_that_goes_wrong_while_a_client_watches(swarm: GossipSwarm, off: float) -> None:
    members = await swarm.announced(2, ttl=120.0)
    client = await swarm.watch(members[0].addresses)
    swarm.clock_off[client.identity.peer] = off
    await asyncio.sleep(300.0)
    await swarm.until_known(client, *(member.info() for member in members))


@pytest.mark.parametrize("off", [HOUR, -HOUR, 20 * YEAR])
async def test_members_that_do_not_tell_the_time_are_not_believed_but_the_clock_is_named(
    swarm: GossipSwarm, off: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = _Watcher.take

    def older(self: _Watcher, count: int, clock: float) -> RecordBatch:
        return take(self, count, 0.0)

    monkeypatch.setattr(_Watcher, "take", older)
    members = await swarm.announced(2, ttl=120.0)
    client = await swarm.watch(members[0].addresses, clock_off=off)
    assert client.knows()
    assert f"clock is {how_far_off(off)} that of" in caplog.text and "set the clock" in caplog.text


async def test_what_a_dead_server_announced_long_ago_brings_nobody_back(swarm: GossipSwarm) -> None:
    """Records that hold by nobody's clock are no reason to doubt one's own."""
    members = await swarm.announced(2, ttl=30.0)
    client = await swarm.watch(members[0].addresses)
    await swarm.crash(members[1])
    await swarm.until_known(client, members[0].info())
    await members[0].registry.withdraw()
    await swarm.until_known(client)
    late = await swarm.watch(members[0].addresses)
    assert late.knows() and not late.registry._clock.followed  # type: ignore[attr-defined]


def test_how_far_off_is_told_in_the_largest_unit() -> None:
    assert how_far_off(3600) == "1 hour ahead of"
    assert how_far_off(-7300) == "2 hours behind"
    assert how_far_off(10 * YEAR) == "10 years ahead of"
    assert how_far_off(-31) == "31 seconds behind"


def test_a_clock_that_is_followed_goes_on_with_the_steady_one() -> None:
    steady, wall = [10.0], [5000.0]
    clock = SwarmClock(lambda: wall[0], lambda: steady[0], 30.0)
    assert clock() == 5000.0 and not clock.differs(5029.0) and clock.differs(5031.0)
    clock.follow(9000.0)
    wall[0], steady[0] = 1.0, 15.0
    assert clock() == 9005.0 and "behind" in repr(clock)
    clock.release()
    assert clock() == 1.0

"""Whole swarms of gossip registries, on a memory network and virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import pytest

from swarmcore.errors import PeerUnreachableError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.registry.gossip.messages import COMPARE, EXCHANGE, CompareDigests, ExchangeRecords
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.records import RecordIssuer, SignedRecord
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.store import Drop
from swarmcore.rpc import Node
from swarmcore.testing.gossip import EPOCH, GossipSwarm, faulty_memory
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.testing.registry_contract import Member
from swarmcore.types import Address

pytestmark = pytest.mark.virtual_time


@pytest.fixture
async def swarm() -> AsyncIterator[GossipSwarm]:
    async with aclosing(GossipSwarm(faulty_memory(Random(1)))) as swarm:
        yield swarm


@pytest.fixture
async def long_lived() -> AsyncIterator[GossipSwarm]:
    """A swarm whose heartbeats are few, for tests of many minutes, in virtual time."""
    seldom = GossipOptions(heartbeat_interval=3.0)
    async with aclosing(GossipSwarm(faulty_memory(Random(1)), options=seldom)) as swarm:
        yield swarm


async def test_news_reach_thirty_members_within_a_second_and_a_bound_of_calls(swarm: GossipSwarm) -> None:
    members = await swarm.announced(30, ttl=3000.0)
    await asyncio.sleep(20.0)
    calls, started = swarm.calls(), asyncio.get_running_loop().time()
    await members[7].registry.announce(members[7].info(sessions=1), 3000.0)
    everyone = [member.info(sessions=int(member is members[7])) for member in members]
    await asyncio.sleep(0.5)
    reached = sum(member.knows(*everyone) for member in members)
    assert reached >= 27  # the others learn of it by anti-entropy
    assert swarm.calls() - calls <= 30 * 3 + 10  # three pushes each, and some anti-entropy
    for member in members:
        await swarm.until_known(member, *everyone)
    assert asyncio.get_running_loop().time() - started < 20.0


async def test_a_swarm_at_rest_costs_one_call_a_member_and_interval(long_lived: GossipSwarm) -> None:
    await long_lived.announced(10, ttl=3600.0)
    await asyncio.sleep(30.0)
    calls = long_lived.calls()
    await asyncio.sleep(500.0)
    assert long_lived.calls() - calls <= 10 * 500 / 5 * 1.1


async def test_one_may_join_through_any_member(swarm: GossipSwarm) -> None:
    members = await swarm.announced(5)
    late = await swarm.join(bootstrap=members[3].addresses)
    assert late.knows(*(member.info() for member in members))
    await late.registry.announce(late.info(), 30.0)
    await swarm.until_known(members[0], *(member.info() for member in [*members, late]))


async def test_the_death_of_every_bootstrap_peer_breaks_nothing(swarm: GossipSwarm) -> None:
    bootstraps = [await swarm.join(bootstrap=[]), await swarm.join()]
    addresses = [url for member in bootstraps for url in member.addresses]
    servers = [await swarm.join(bootstrap=addresses) for _ in range(6)]
    for member in [*bootstraps, *servers]:
        await member.registry.announce(member.info(), 30.0)
    await swarm.until(servers[0], lambda view: len(view) == 8)
    for member in bootstraps:
        await swarm.crash(member)
    for server in servers:
        await swarm.until_known(server, *(s.info() for s in servers))
    await servers[0].registry.announce(servers[0].info(sessions=9), 30.0)
    everyone = [s.info(sessions=9 * (s is servers[0])) for s in servers]
    for server in servers:
        await swarm.until_known(server, *everyone)
    newcomer = await swarm.join(bootstrap=[*addresses, *servers[2].addresses])
    assert newcomer.knows(*everyone)


async def test_a_split_swarm_heals_although_all_records_of_the_other_side_expired(
    long_lived: GossipSwarm,
) -> None:
    members = await long_lived.announced(10)
    left, right = members[:5], members[5:]
    long_lived.split(left, right)
    for side in (left, right):
        for member in side:
            await long_lived.until_known(member, *(m.info() for m in side))
    await asyncio.sleep(600.0)
    long_lived.heal()
    long_lived.patience = 300.0
    for member in members:
        await long_lived.until_known(member, *(m.info() for m in members))


async def test_a_peer_restarts_at_a_new_address(swarm: GossipSwarm) -> None:
    members = await swarm.announced(4)
    await swarm.crash(members[1])
    again = await swarm.join(members[1].identity, members[0].addresses)
    assert again.addresses != members[1].addresses
    await again.registry.announce(again.info(), 30.0)
    for member in (members[0], *members[2:], again):
        await swarm.until_known(member, members[0].info(), members[2].info(), members[3].info(), again.info())


async def test_a_peer_restarts_with_its_clock_set_back(swarm: GossipSwarm) -> None:
    members = await swarm.announced(4)
    await swarm.crash(members[1])
    swarm.clock_off[members[1].identity.peer] = -20.0
    again = await swarm.join(members[1].identity, members[0].addresses)
    await again.registry.announce(again.info(sessions=2), 30.0)
    others = [members[0], *members[2:]]
    for member in others:
        await swarm.until_known(member, again.info(sessions=2), *(m.info() for m in others))


async def test_a_clock_that_was_far_ahead_and_is_set_right_does_not_silence_a_peer(
    swarm: GossipSwarm,
) -> None:
    other = await swarm.join()
    await other.registry.announce(other.info(), 30.0)
    one = await swarm.join()
    swarm.clock_off[one.identity.peer] = 3600.0
    await one.registry.announce(one.info(), 30.0)
    await asyncio.sleep(20.0)
    assert other.knows(other.info())
    swarm.clock_off[one.identity.peer] = 0.0
    await swarm.until_known(other, one.info(), other.info())
    await swarm.until_known(one, one.info(), other.info())


async def test_clocks_too_far_apart_are_reported(
    swarm: GossipSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    one = await swarm.join()
    await one.registry.announce(one.info(), 30.0)
    off = await swarm.join()
    swarm.clock_off[off.identity.peer] = 300.0
    with caplog.at_level(logging.WARNING, "swarmcore.registry.gossip.registry"):
        await asyncio.sleep(60.0)
    assert "set the clocks" in caplog.text
    assert len(caplog.records) == 1


async def test_two_processes_with_one_identity_are_reported(
    swarm: GossipSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await swarm.announced(2)
    twin = RecordIssuer(one.identity, lambda: EPOCH + asyncio.get_running_loop().time() + 5.0)
    await push(swarm, other, twin.announce(one.info(sessions=7), 30.0), to=one)
    await swarm.until_known(one, one.info(), other.info())  # it insists on its own words
    assert "give each its own identity" in caplog.text


async def test_start_names_what_was_tried_when_nobody_answers(swarm: GossipSwarm) -> None:
    one = await swarm.join()
    await swarm.crash(one)
    other = await swarm.join(bootstrap=[])
    await swarm.crash(other)
    with pytest.raises(PeerUnreachableError) as raised:
        await swarm.join(bootstrap=[*one.addresses, *other.addresses])
    assert one.addresses[0] in raised.value.message
    assert other.addresses[0] in raised.value.message


async def test_one_dead_bootstrap_peer_does_not_keep_one_from_joining(swarm: GossipSwarm) -> None:
    dead, alive = await swarm.join(), await swarm.join()
    await alive.registry.announce(alive.info(), 30.0)
    await swarm.crash(dead)
    for _ in range(5):
        late = await swarm.join(bootstrap=[*dead.addresses, *alive.addresses])
        assert late.knows(alive.info())


async def test_being_ones_own_bootstrap_peer_is_fine() -> None:
    me = Identity.generate()
    async with Node(me, [MemoryNetwork().transport(me)]) as node:
        registry = GossipRegistry(node, node.addresses)
        await registry.start()
        await registry.close()


async def push(swarm: GossipSwarm, sender: Member, *records: SignedRecord, to: Member) -> None:
    node = swarm.nodes[sender.identity.peer]
    addresses = [Address.parse(url) for url in to.addresses]
    await node.call(addresses, EXCHANGE, ExchangeRecords(records, spread=True))


async def test_bad_records_from_the_network_are_dropped_and_counted(swarm: GossipSwarm) -> None:
    one, other, bystander = await swarm.announced(3)
    now = EPOCH + asyncio.get_running_loop().time()
    old, late = (
        RecordIssuer(other.identity, lambda: now - 20),
        RecordIssuer(other.identity, lambda: now - 3600),
    )
    genuine = RecordIssuer(other.identity, lambda: now + 1).announce(other.info(sessions=3), 30.0)
    forged = SignedRecord(genuine.payload, one.identity.sign(genuine.payload))
    await push(
        swarm,
        other,
        old.announce(other.info(sessions=4), 30.0),
        late.announce(other.info(sessions=5), 30.0),
        SignedRecord(bytes(10_000), bytes(64)),
        SignedRecord(b"\xff" * 100, bytes(64)),
        to=one,
    )
    with pytest.raises(ProtocolError, match="not signed"):  # at the first, whatever else there is
        await push(swarm, other, *[forged] * 200, to=one)
    assert isinstance(one.registry, GossipRegistry)
    bad = {Drop.FORGED, Drop.REPLAYED, Drop.EXPIRED, Drop.OVERSIZED, Drop.MALFORMED}
    assert {reason: one.registry.dropped.get(reason) for reason in bad} == dict.fromkeys(bad, 1)
    assert one.knows(one.info(), other.info(), bystander.info())
    assert isinstance(bystander.registry, GossipRegistry)
    assert not bad & set(bystander.registry.dropped)  # none was passed on


async def test_malformed_requests_are_refused(swarm: GossipSwarm) -> None:
    one, other = await swarm.announced(2)
    node, to = swarm.nodes[one.identity.peer], [Address.parse(url) for url in other.addresses]
    with pytest.raises(ProtocolError, match="digest"):
        await node.call(to, COMPARE, CompareDigests(b"short"))
    with pytest.raises(ProtocolError, match="keys"):
        await node.call(to, EXCHANGE, ExchangeRecords(wanted=b"short"))


async def test_a_run_repeats_itself() -> None:
    async def story() -> tuple[int, float]:
        async with aclosing(GossipSwarm(seed=5)) as swarm:
            started = asyncio.get_running_loop().time()
            members = await swarm.announced(12)
            await swarm.crash(members[4])
            await swarm.until(members[0], lambda view: len(view) == 11)
            return swarm.calls(), round(asyncio.get_running_loop().time() - started, 3)

    assert await story() == await story()

"""Deaths, hangs, liars and partitions, in whole swarms on a memory network and virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import attrs
import pytest

from swarmcore.registry.gossip import failure_detector
from swarmcore.registry.gossip.messages import CHECK, EXCHANGE, ExchangeRecords
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.suspicion import BURST, SHORTEST_MUTE, Suspected
from swarmcore.testing.faulty import Faults
from swarmcore.testing.gossip import GossipSwarm, faulty_memory
from swarmcore.testing.registry_contract import Member
from swarmcore.types import Address, PeerId

pytestmark = pytest.mark.virtual_time

TTL = 300.0
NO_HEARTBEATS = GossipOptions(heartbeat_interval=0.0)


@pytest.fixture
async def swarm() -> AsyncIterator[GossipSwarm]:
    async with aclosing(GossipSwarm(faulty_memory(Random(1), Faults(delay=0.02)))) as swarm:
        yield swarm


@pytest.fixture
async def quiet_swarm() -> AsyncIterator[GossipSwarm]:
    """One without heartbeats, for crashes: these the network tells of."""
    async with aclosing(
        GossipSwarm(faulty_memory(Random(1), Faults(delay=0.02)), options=NO_HEARTBEATS)
    ) as swarm:
        yield swarm


async def announced(swarm: GossipSwarm, count: int) -> list[Member]:
    """``count`` members, announced, that all know each other and hold their heartbeats."""
    members = await swarm.announced(count, ttl=TTL)
    await asyncio.sleep(15.0)
    return members


async def gone_from(swarm: GossipSwarm, observers: list[Member], dead: list[Member]) -> float:
    """Seconds until none of ``dead`` is in any view of ``observers``, all others still being there."""
    started = asyncio.get_running_loop().time()
    lost = {member.identity.peer for member in dead}
    for observer in observers:
        await swarm.until(observer, lambda view: not lost & set(view.servers))
    alive = {m.identity.peer for m in swarm.members if m.addresses} - lost
    for observer in observers:
        assert set(observer.registry.view().servers) == alive
    return asyncio.get_running_loop().time() - started


def sequence_of(observer: Member, peer: PeerId) -> int:
    sequence = observer.registry._replica.store.sequence(peer)  # type: ignore[attr-defined]
    assert isinstance(sequence, int)
    return sequence


async def accuse(swarm: GossipSwarm, liar: Member, victim: Member, to: list[Member]) -> None:
    suspected = Suspected.sign(liar.identity, victim.identity.peer, sequence_of(liar, victim.identity.peer))
    node = swarm.nodes[liar.identity.peer]
    for member in to:
        addresses = [Address.parse(url) for url in member.addresses]
        await node.call(addresses, EXCHANGE, ExchangeRecords(spread=True, suspected=(suspected,)))


class Checks:
    """Counts the checks that a member answers."""

    def __init__(self, swarm: GossipSwarm, member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        self.callers: list[PeerId] = []
        calls = swarm.nodes[member.identity.peer]._server._calls
        method, handler = calls[CHECK.name]

        async def counted(request, caller):  # type: ignore[no-untyped-def]
            self.callers.append(caller.peer)
            return await handler(request, caller)

        monkeypatch.setitem(calls, CHECK.name, (method, counted))


async def test_a_crash_is_known_to_members_and_clients_within_a_second(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 12)
    clients = [await quiet_swarm.watch(member.addresses) for member in members[:3]]
    await quiet_swarm.crash(members[7])
    rest = [member for member in members if member is not members[7]]
    assert await gone_from(quiet_swarm, [*rest, *clients], [members[7]]) < 1.0


@pytest.mark.parametrize("many", [failure_detector.MANY, 2], ids=["each is called", "most are waited for"])
async def test_a_third_of_twenty_crash_at_once(
    many: int, quiet_swarm: GossipSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_detector, "MANY", many)
    members = await announced(quiet_swarm, 20)
    dead = Random(3).sample(members[1:], 7)
    rest = [member for member in members if member not in dead]
    clients = [await quiet_swarm.watch(rest[0].addresses), await quiet_swarm.watch(dead[0].addresses)]
    for member in dead:
        await quiet_swarm.crash(member)
    assert await gone_from(quiet_swarm, [*rest, *clients], dead) < 5.0


async def test_a_host_that_hangs_is_out_within_five_seconds_and_back_when_it_goes_on(
    swarm: GossipSwarm,
) -> None:
    members = await announced(swarm, 8)
    client = await swarm.watch(members[0].addresses)
    hung, rest = members[5], [*members[:5], *members[6:]]
    swarm.hang(hung)
    assert await gone_from(swarm, [*rest, client], [hung]) < 5.0
    await asyncio.sleep(30.0)
    swarm.heal()
    started = asyncio.get_running_loop().time()
    for observer in [*rest, client, hung]:
        await swarm.until(observer, lambda view: len(view) == 8)
    assert asyncio.get_running_loop().time() - started < 60.0


async def test_a_short_stall_evicts_nobody(swarm: GossipSwarm) -> None:
    members = await announced(swarm, 6)
    changes = [member.registry.changes() for member in members]
    swarm.hang(members[2])
    await asyncio.sleep(3.0)
    swarm.heal()
    for reader in changes:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10.0):
                await anext(reader)


def test_one_liar_has_not_the_credit_to_keep_others_from_calling() -> None:
    assert BURST < failure_detector.MANY


async def test_who_is_waited_for_and_not_called_refutes(
    swarm: GossipSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time for nearly all; whom the news misses, as it may, has it back with the next anti-entropy."""
    monkeypatch.setattr(failure_detector, "MANY", 0)
    members = await announced(swarm, 10)
    liar, victim, *others = members
    client = await swarm.watch(others[0].addresses)
    await accuse(swarm, liar, victim, others[3:4])
    observers = [*others, client]
    await asyncio.sleep(failure_detector.REFUTE + 0.5)
    assert sum(victim.identity.peer in o.registry.view().servers for o in observers) >= len(observers) - 2
    for observer in observers:
        await swarm.until(observer, lambda view: victim.identity.peer in view.servers)


async def test_a_liar_evicts_nobody_and_is_soon_not_heard(
    swarm: GossipSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = await announced(swarm, 10)
    liar, victim, *others = members
    client = await swarm.watch(others[0].addresses)
    checks = Checks(swarm, victim, monkeypatch)
    changes = [member.registry.changes() for member in (*others, client)]
    until = asyncio.get_running_loop().time() + SHORTEST_MUTE
    while asyncio.get_running_loop().time() < until - 1.0:
        await accuse(swarm, liar, victim, others)
    once = {member.identity.peer for member in (*others, client)}
    assert len(checks.callers) == len(set(checks.callers)) == len(once)
    assert set(checks.callers) == once
    for reader in changes:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.0):
                await anext(reader)


async def test_forged_and_unknown_accusations_are_not_looked_into(
    swarm: GossipSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = await announced(swarm, 4)
    liar, victim, bystander, target = members
    checks = Checks(swarm, victim, monkeypatch)
    peer = victim.identity.peer
    sequence = sequence_of(target, peer)
    stranger = swarm._new_identity()
    forged = Suspected(bystander.identity.peer, peer, sequence, liar.identity.sign(b"anything"))
    unknown = Suspected.sign(stranger, peer, sequence)
    own = Suspected.sign(victim.identity, peer, sequence)
    node = swarm.nodes[liar.identity.peer]
    news = ExchangeRecords(spread=True, suspected=(forged, unknown, own))
    await node.call([Address.parse(url) for url in target.addresses], EXCHANGE, news)
    await asyncio.sleep(5.0)
    assert checks.callers == []


async def test_an_accusation_about_an_older_record_is_looked_into() -> None:
    """Not everybody has what a server announced last before it died."""
    options = GossipOptions(heartbeat_members=0, interval=600.0)
    async with aclosing(GossipSwarm(faulty_memory(Random(4)), options=options)) as swarm:
        swarm.patience = 1200.0
        members = await announced(swarm, 6)
        accuser, victim, *others = members
        older = sequence_of(accuser, victim.identity.peer)
        await victim.registry.announce(attrs.evolve(victim.info(), sessions=1), TTL)
        for member in members:
            await swarm.until(member, lambda view: view.servers[victim.identity.peer].sessions == 1)
        await swarm.crash(victim)
        suspected = Suspected.sign(accuser.identity, victim.identity.peer, older)
        node = swarm.nodes[accuser.identity.peer]
        for address in others[0].addresses:
            news = ExchangeRecords(spread=True, suspected=(suspected,))
            await node.call(Address.parse(address), EXCHANGE, news)
        assert await gone_from(swarm, others, [victim]) < 5.0


async def test_a_hidden_peer_that_lives_is_shown_although_its_clock_is_late(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 4)
    observer, late = members[:2]
    peer = late.identity.peer
    replica = observer.registry._replica  # type: ignore[attr-defined]
    assert replica.hide(peer, sequence_of(observer, peer))
    quiet_swarm.clock_off[peer] = -20.0
    news = attrs.evolve(late.info(), sessions=1)
    await late.registry.announce(news, TTL)
    started = asyncio.get_running_loop().time()
    await quiet_swarm.until(observer, lambda view: view.servers.get(peer) == news)
    assert asyncio.get_running_loop().time() - started < 1.0


async def test_a_suspect_refutes_with_a_newer_record(swarm: GossipSwarm) -> None:
    members = await announced(swarm, 5)
    liar, victim, *others = members
    before = sequence_of(liar, victim.identity.peer)
    await accuse(swarm, liar, victim, others)
    await asyncio.sleep(1.0)
    assert all(sequence_of(member, victim.identity.peer) > before for member in others)


async def test_a_peer_that_only_one_member_cannot_reach_stays_with_the_others(swarm: GossipSwarm) -> None:
    members = await announced(swarm, 8)
    lonely, server = members[0], members[4]
    rest = [member for member in members if member is not lonely]
    readers = [member.registry.changes() for member in rest if member is not server]
    swarm.split([lonely], [server])
    lonely.registry.suspect(server.identity.peer)
    await swarm.until(lonely, lambda view: server.identity.peer not in view.servers)
    for reader in readers:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                while (await anext(reader)).info.peer != server.identity.peer:
                    pass


async def test_a_report_of_a_client_is_looked_into_by_the_swarm() -> None:
    options = GossipOptions(heartbeat_members=0, interval=60.0)
    async with aclosing(GossipSwarm(faulty_memory(Random(2)), options=options)) as swarm:
        swarm.patience = 300.0
        members = [await swarm.join() for _ in range(4)]
        for member in members:
            await member.registry.announce(member.info(), TTL)
        for member in members:
            await swarm.until_known(member, *(m.info() for m in members))
        client = await swarm.watch(members[0].addresses)
        await swarm.crash(members[2])
        assert members[2].identity.peer in client.registry.view().servers  # nobody has reason to ask
        client.registry.suspect(members[2].identity.peer)
        client.registry.suspect(members[1].identity.peer)  # wrongly
        observers = [client, members[0], members[1], members[3]]
        assert await gone_from(swarm, observers, [members[2]]) < 2.0


async def test_a_newcomer_is_told_who_is_dead(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 5)
    await quiet_swarm.crash(members[3])
    rest = [*members[:3], members[4]]
    await gone_from(quiet_swarm, rest, [members[3]])
    late = await quiet_swarm.join(bootstrap=members[0].addresses)
    client = await quiet_swarm.watch(members[1].addresses)
    assert late.knows(*(member.info() for member in rest))
    assert client.knows(*(member.info() for member in rest))
    await asyncio.sleep(30.0)
    assert client.knows(*(member.info() for member in rest))


async def test_a_peer_restarted_under_its_identity_is_back_at_once(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 6)
    await quiet_swarm.crash(members[2])
    rest = [*members[:2], *members[3:]]
    await gone_from(quiet_swarm, rest, [members[2]])
    again = await quiet_swarm.join(members[2].identity, members[0].addresses)
    started = asyncio.get_running_loop().time()
    await again.registry.announce(again.info(), TTL)
    for observer in rest:
        await quiet_swarm.until(observer, lambda view: len(view) == 6)
    assert asyncio.get_running_loop().time() - started < 1.0
    await quiet_swarm.crash(again)
    assert await gone_from(quiet_swarm, rest, [again]) < 5.0


async def test_a_partition_parts_the_views_and_healing_joins_them_before_the_next_refresh(
    swarm: GossipSwarm,
) -> None:
    members = await announced(swarm, 10)
    left, right = members[:5], members[5:]
    swarm.split(left, right)
    for side in (left, right):
        for member in side:
            await swarm.until_known(member, *(m.info() for m in side))
    swarm.heal()
    started = asyncio.get_running_loop().time()
    for member in members:
        await swarm.until_known(member, *(m.info() for m in members))
    assert asyncio.get_running_loop().time() - started < 40.0


async def test_an_address_that_leads_nowhere_does_not_make_a_peer_look_dead(swarm: GossipSwarm) -> None:
    members = await announced(swarm, 4)
    one, other = members[:2]
    peer = one.identity.peer
    nowhere = tuple(f"memory://nowhere{number}/{peer}" for number in range(8))
    info = attrs.evolve(one.info(), addresses=(*nowhere, *one.addresses))
    await one.registry.announce(info, TTL)
    await swarm.until(other, lambda view: view.servers[peer] == info)
    changes = other.registry.changes()
    other.registry.suspect(peer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await anext(changes)


async def test_the_living_stay_in_all_views_over_many_refreshes(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 5)
    client = await quiet_swarm.watch(members[0].addresses)
    readers = [member.registry.changes() for member in (*members, client)]
    await asyncio.sleep(3 * TTL)
    for reader in readers:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(reader)


async def test_heartbeats_go_to_the_next_two_and_do_not_thrash(quiet_swarm: GossipSwarm) -> None:
    members = await announced(quiet_swarm, 12)
    heartbeats = [m.registry._detector.heartbeats for m in members]  # type: ignore[attr-defined]
    assert [len(each._opened) for each in heartbeats] == [2] * 12
    assert sum(len(each._accepted) for each in heartbeats) == 24
    calls = quiet_swarm.calls()
    await asyncio.sleep(60.0)
    assert quiet_swarm.calls() - calls <= 12 * 60 / 5 * 1.4  # comparisons only


async def test_nothing_is_logged_as_an_error(swarm: GossipSwarm, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        members = await announced(swarm, 6)
        await swarm.crash(members[1])
        swarm.hang(members[3])
        await asyncio.sleep(30.0)
    assert caplog.records == []

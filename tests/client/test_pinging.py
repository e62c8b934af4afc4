"""A client knows who is near: it pings the servers of the models it uses, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from measured_peers import MODEL, MeasuredPeers, measured_peers

from swarmcore.client.pinging import Pinger, PingLimits, most_promising
from swarmcore.routing.costs import Latencies
from swarmcore.routing.health import PeerHealth
from swarmcore.rpc.ping import PINGS

pytestmark = pytest.mark.virtual_time


@asynccontextmanager
async def pinging(peers: MeasuredPeers, **options: Any) -> AsyncIterator[Pinger]:
    pinger = Pinger(peers.node, peers.view, Latencies(), PeerHealth(), rng=Random(0), **options)
    pinger.start()
    try:
        yield pinger
    finally:
        await pinger.close()


async def test_round_trips_are_known_after_the_first_look() -> None:
    async with measured_peers() as peers:
        near, far = await peers.add(0, 12, 0.02), await peers.add(0, 12, 0.08)
        async with pinging(peers) as pinger:
            assert not pinger._latencies.seconds
            await pinger.follow(MODEL)
            assert dict(pinger._latencies.seconds) == pytest.approx({near: 0.02, far: 0.08})


async def test_a_look_does_not_wait_for_who_does_not_answer() -> None:
    async with measured_peers() as peers:
        await peers.add(0, 12, 30.0)
        async with pinging(peers) as pinger:
            started = asyncio.get_running_loop().time()
            await pinger.follow(MODEL, timeout=1.0)
            assert asyncio.get_running_loop().time() - started == pytest.approx(1.0)


async def test_nobody_is_pinged_for_a_model_that_is_not_used_any_more() -> None:
    async with measured_peers() as peers:
        await peers.add(0, 12, 0.02)
        async with pinging(peers, limits=PingLimits(idle=100.0, refresh=30.0)) as pinger:
            await pinger.follow(MODEL)
            for _ in range(6):
                await asyncio.sleep(50)
                pinger.used(MODEL)
            await asyncio.sleep(200)
            # One ping is enough each time: the round trip is what it was.
            pinged = len(peers.pings)
            assert PINGS + 300 / 60 < pinged < PINGS + 500 / 24
            await asyncio.sleep(1000)
            assert len(peers.pings) == pinged
            await pinger.follow(MODEL)
            assert len(peers.pings) > pinged


async def test_nobody_is_pinged_before_a_model_is_in_use_and_nobody_after_the_end() -> None:
    async with measured_peers() as peers:
        await peers.add(0, 12, 0.02)
        async with pinging(peers) as pinger:
            await asyncio.sleep(300)
            assert not peers.pings
            await pinger.follow(MODEL)
        pinged = len(peers.pings)
        await asyncio.sleep(300)
        assert len(peers.pings) == pinged == PINGS


async def test_measurements_are_kept_fresh_and_new_servers_are_found() -> None:
    async with measured_peers() as peers:
        old = await peers.add(0, 12, 0.02)
        async with pinging(peers, limits=PingLimits(idle=1e9)) as pinger:
            await pinger.follow(MODEL)
            new = await peers.add(0, 12, 0.04)
            for _ in range(30):
                await asyncio.sleep(20)
                now = asyncio.get_running_loop().time()
                assert pinger._latencies.age(old, now) < 60 + 1.25 * 15 + 1
                assert pinger._latencies.age(new, now) < 60 + 1.25 * 15 + 1
            assert peers.pings.count(old) < PINGS * 600 / 45


async def test_who_does_not_answer_three_times_is_banned_until_it_does() -> None:
    async with measured_peers() as peers:
        await peers.add(0, 12, 0.02)
        gone = peers.add_unreachable(0, 12)
        async with pinging(peers) as pinger:
            await pinger.follow(MODEL)
            assert not pinger._health.banned(asyncio.get_running_loop().time())
            failures = 0
            for _ in range(60):
                await asyncio.sleep(5)
                banned = pinger._health.banned(asyncio.get_running_loop().time())
                failures = max([failures, *(ban.failures for ban in banned.values())])
                assert set(banned) <= {gone}
            assert failures >= 1


async def test_servers_that_may_not_be_used_are_not_pinged() -> None:
    async with measured_peers() as peers:
        used, unused = await peers.add(0, 12, 0.02), await peers.add(0, 12, 0.02)
        await peers.add(0, 12, 0.02, state="draining")
        async with pinging(peers, admits=lambda peer: peer != unused) as pinger:
            await pinger.follow(MODEL)
        assert set(peers.pings) == {used}


async def test_no_more_are_pinged_than_the_limit_and_every_block_has_some() -> None:
    async with measured_peers() as peers:
        for start in (0, 0, 0, 6, 6, 6):
            await peers.add(start, start + 6, 0.02)
        limits = PingLimits(for_each_block=2, servers=5)
        chosen = most_promising(peers.servers.values(), Latencies(), limits)
        assert sorted(server.span.start for server in chosen if server.span) == [0, 0, 6, 6]
        assert len(most_promising(peers.servers.values(), Latencies(), PingLimits(servers=3))) == 3


async def test_the_near_and_the_fast_are_promising_and_so_is_who_was_never_measured() -> None:
    async with measured_peers() as peers:
        far, near, unknown = [await peers.add(0, 12, 0.02) for _ in range(3)]
        slow = await peers.add(0, 12, 0.02)
        peers.change(slow, decode_rps=0.1)
        latencies = Latencies()
        for peer, seconds in ((far, 0.3), (near, 0.01), (slow, 0.01)):
            latencies.measured(peer, seconds, 0)
        chosen = most_promising(peers.servers.values(), latencies, PingLimits())
        assert [server.peer for server in chosen] == [unknown, near, far, slow]

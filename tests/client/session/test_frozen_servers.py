"""Many sessions on servers that freeze: how long a text stands still, in simulated time."""

from __future__ import annotations

import asyncio
import random

import pytest
from memory_swarm import Run, Swarm, quiet, swarm_of

from swarmcore.rpc.ping import measure_round_trip

pytestmark = pytest.mark.virtual_time

SPANS = ("0:4", "4:8", "8:12")
SESSIONS = 5
ROW_SECONDS = 0.0007
"""Of a row through a third of the blocks: SmolLM2 on one core."""
LIMIT = 2.5
"""Seconds that a text may stand still."""


async def texts(swarm: Swarm, number: int, until: float, gaps: list[float], journal: str) -> int:
    """Short texts, one after the other, each in a session of its own."""
    loop, failovers, rng = asyncio.get_running_loop(), 0, random.Random(number)
    while loop.time() < until:
        latest = loop.time()
        session = await swarm.open(journal=journal)
        run = Run.of(session, number)
        await run.step(rng.choice([20, 20, 20, 200]))
        for _ in range(48):
            gaps.append(loop.time() - latest)
            latest = loop.time()
            await run.step(1)
            await asyncio.sleep(0.005)
        failovers += session.failovers
        await session.close()
    return failovers


@pytest.mark.parametrize(("seed", "journal"), [(1, "client")])
async def test_no_text_stands_still_for_long_when_servers_freeze(seed: int, journal: str) -> None:
    async with swarm_of(*SPANS, *SPANS, seed=seed, delay=0.001, cache=8192) as swarm:
        for server in swarm.servers:
            server.executor.step_seconds = ROW_SECONDS
        loop, rng, gaps = asyncio.get_running_loop(), random.Random(seed), list[float]()
        end = loop.time() + 10
        talking = [
            asyncio.create_task(texts(swarm, number, end, gaps, journal)) for number in range(SESSIONS)
        ]
        for _ in range(3):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            frozen = rng.choice(swarm.servers)
            frozen.transport.partition()
            await asyncio.sleep(rng.uniform(1.5, 5))
            frozen.transport.heal()
        failovers = sum(await asyncio.gather(*talking))
        assert failovers >= 3, "freezes were noticed"
        long = sorted(gap for gap in gaps if gap > 0.5)
        assert long[int(0.9 * len(long))] <= LIMIT and long[-1] <= LIMIT + 1, long
        await quiet(swarm)


async def test_one_frozen_server_does_not_hold_up_a_session_that_opens() -> None:
    """Those before it in the chain wait to dial it; nobody waits for them."""
    async with swarm_of(*SPANS, *SPANS, delay=0.001) as swarm:
        for server in swarm.servers:  # as clients do now and then
            await measure_round_trip(swarm.client, server.info(), timeout=5.0)
        frozen = swarm.servers[1]
        frozen.transport.partition()
        loop = asyncio.get_running_loop()
        opened = 0
        for _ in range(4):
            began = loop.time()
            session = await swarm.open()
            opened += frozen.peer not in session.chain.peers
            # Who was silent is given twice as long the next time: it may only be busy.
            assert loop.time() - began < (LIMIT if opened == 1 else 2 * LIMIT)
            await session.close()
            swarm.health.succeeded(frozen.peer)
        assert opened == 4
        frozen.transport.heal()
        await quiet(swarm)

"""Servers that leave in good order: their sessions are handed over, or replayed elsewhere in time."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from memory_swarm import Run, quiet, swarm_of

from swarmcore.errors import (
    SpanError,
)
from swarmcore.types import Span

pytestmark = pytest.mark.virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
MODES = pytest.mark.parametrize("journal", ["client", "servers"])


@MODES
async def test_a_server_that_leaves_hands_its_caches_over(journal: str) -> None:
    async with swarm_of(*TWICE, delay=0.01) as swarm:
        session = await swarm.open(2, journal=journal)
        run = Run.of(session)
        await run.step(5, 3)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        drained = asyncio.create_task(leaving.service.drain(30))
        for _ in range(10):
            await run.step(1, 1)
        assert await drained == 0
        assert leaving.peer not in session.chain.peers
        assert [failover.how for failover in swarm.failovers] == ["handed over"]
        taker = swarm.serving(session, 1)
        assert taker.engine.counters["tokens"] < 2 * 10, "nothing was computed again"
        await session.close()
        await quiet(swarm)


async def test_what_was_handed_over_has_no_outputs_to_replay_and_the_stage_before_helps_out() -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal="servers")
        run = Run.of(session)
        await run.step(5)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        assert await leaving.service.drain(30) == 0
        await run.step(1)
        await swarm.serving(session, 2).kill()
        await run.step(1)
        assert [failover.how for failover in swarm.failovers] == ["handed over", "replayed"]
        await run.step(1)
        await session.close()
        await quiet(swarm)


async def test_an_idle_session_is_handed_over_too() -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal="off")
        run = Run.of(session)
        await run.step(5)
        leaving = swarm.serving(session, 2)
        await leaving.registry.withdraw()
        assert await leaving.service.drain(30) == 0
        await run.step(1)
        await session.close()
        await quiet(swarm)


async def test_a_server_that_leaves_for_several_is_replayed() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        await swarm.add("4:6")
        await swarm.add("6:8")
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        assert await leaving.service.drain(30) == 0
        await run.step(1)
        assert [failover.how for failover in swarm.failovers] == ["replayed"]
        await session.close()
        await quiet(swarm)


async def test_a_server_without_a_successor_serves_until_it_goes() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        leaving = swarm.serving(session, 1)
        await leaving.registry.withdraw()
        drained = asyncio.create_task(leaving.service.drain(5))
        await run.step(1)
        assert await drained == 1
        await run.step(1)
        await session.close()
        await quiet(swarm)


async def test_the_taker_of_caches_dies() -> None:
    for tick in range(20):
        async with swarm_of(*TWICE, delay=0.01) as swarm:
            session = await swarm.open()
            run = Run.of(session)
            await run.step(5)
            leaving = swarm.serving(session, 1)
            await leaving.registry.withdraw()
            drained = asyncio.create_task(leaving.service.drain(30))
            await asyncio.sleep(tick * 0.005)
            spare = next(
                s for s in swarm.servers if s is not leaving and s.executor.span == leaving.executor.span
            )
            await spare.kill()
            await swarm.add("4:8")
            await run.step(1)
            assert await drained == 0
            await run.step(1)
            await session.close()
            await quiet(swarm)


async def test_blocks_that_stay_keep_their_sessions() -> None:
    async with swarm_of("0:12", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        assert len(session.chain) == 1
        whole = swarm.serving(session, 0)
        assert await whole.service.drain(1, keep=Span(0, 6)) == 1, "nobody else holds the first blocks"
        await session.close()
        assert await whole.service.drain(1, keep=Span(0, 6)) == 0
        with pytest.raises(SpanError):
            await swarm.open()
        await whole.registry.announce(attrs.evolve(whole.info(), span=Span(0, 6)), 60)
        session = await swarm.open()
        await Run.of(session).step(3)
        await session.close()

"""Servers vanish at every moment of a session; what comes out is what comes out without it."""

from __future__ import annotations

import asyncio

import pytest
from memory_swarm import Run, quiet, swarm_of

from swarmcore.errors import MissingBlocksError, SessionLostError, UnavailableError

pytestmark = pytest.mark.virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
MODES = pytest.mark.parametrize("journal", ["client", "servers"])


@MODES
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("moment", range(12))
async def test_a_server_dies_before_any_step(journal: str, stage: int, moment: int) -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        for step in range(12):
            if step == moment:
                await swarm.serving(session, stage).kill()
            await run.step(5 if step == 0 else 1)
        assert session.failovers == 1
        (failover,) = swarm.failovers
        assert failover.tokens == (4 + moment if moment else 0)
        await session.close()
        await quiet(swarm)


async def test_without_a_journal_a_failure_ends_the_session() -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal="off")
        run = Run.of(session)
        await run.step(3)
        await swarm.serving(session, 1).kill()
        with pytest.raises(UnavailableError):
            await run.step(1)
        with pytest.raises(UnavailableError):
            await run.step(1)
        await session.close()
        await quiet(swarm)

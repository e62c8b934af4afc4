"""Failures at every moment of a busy session: prefill in chunks, decode, beams, rollback.

`FAILOVER_TICK=0.003` tries more of them.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from memory_swarm import Run, Swarm, befall, quiet, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.testing.clock import run as run_on_virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
DELAY = 0.010
SPAN_OF_TIME = 0.33
"""Virtual seconds that `busy` takes without failures, and a little more."""

TICK = float(os.environ.get("FAILOVER_TICK", "0.0154"))
"""Between two moments that are tried; not in step with the delay."""

MISFORTUNES = ("kill:0", "restart:1", "kill:2", "restart:0", "kill:1", "restart:2", "break:1")


async def busy(session: InferenceSession) -> None:
    """A bit of everything that sessions do; every output is checked."""
    run = Run.of(session)
    await run.step(11, 0, 5, reply="all")  # in chunks
    await run.step(1, 6, 1)
    await run.step(1, 1, 1, sources=(2, 0, 2))
    await run.step(1, 1, 1, sources=(0, 0, 1))
    await run.step(2, 0, 1)
    positions = session.positions
    await run.step(1, 1, 1, starts=[positions[0] - 2, positions[1], positions[2] - 1])
    await run.step(1, 1, 1, sources=(1, 1, 1))
    await run.step(1, 1, 1)


async def survive(moments: list[tuple[float, str]], journal: str, seed: int = 0) -> Swarm:
    """Run `busy` with failures at the given times: ``"kill:1"`` for the server of stage 1, and so on."""
    async with swarm_of(*TWICE, seed=seed, delay=DELAY) as swarm:
        session = await swarm.open(3, journal=journal, chunk_rows=4)
        start = asyncio.get_running_loop().time()

        async def fail() -> None:
            for when, what in moments:
                await asyncio.sleep(start + when - asyncio.get_running_loop().time())
                kind, stage = what.split(":")
                await befall(swarm, session, kind, int(stage))

        failing = asyncio.create_task(fail())
        await busy(session)
        failing.cancel()
        await asyncio.gather(failing, return_exceptions=True)
        await session.close()
        await quiet(swarm)
    return swarm


@pytest.mark.parametrize("misfortune", MISFORTUNES)
def test_at_every_moment(misfortune: str) -> None:
    ticks = round(SPAN_OF_TIME / TICK)
    failovers = 0
    first = TICK * MISFORTUNES.index(misfortune) / len(MISFORTUNES)  # each has moments of its own
    for tick in range(ticks):
        moments = [(first + tick * TICK, misfortune)]
        failovers += len(run_on_virtual_time(survive(moments, ("client", "servers")[tick % 2])).failovers)
    assert failovers > 0.9 * ticks


@pytest.mark.parametrize("second", ["kill:0", "kill:1", "kill:2"])
def test_another_one_at_every_moment_after(second: str) -> None:
    """The second failure hits the recovery from the first: its search, its replay, its resending."""
    for tick in range(20):
        moments = [(0.145, "kill:1"), (0.145 + (3 * tick + int(second[-1])) * 0.002, second)]
        assert run_on_virtual_time(survive(moments, ("client", "servers")[tick % 2])).failovers

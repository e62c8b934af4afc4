"""Failures at every moment of a session that begins with what servers have kept.

`FAILOVER_TICK=0.003` tries more of them.
"""

from __future__ import annotations

import asyncio
import os

import pytest
from memory_swarm import Reference, befall, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.testing.clock import run as run_on_virtual_time
from swarmcore.testing.executor import Rows, hidden_states, read_rows

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
PROMPTS = [[7 * n % 101 for n in range(150)], [5 * n % 97 for n in range(70)]]
SPAN_OF_TIME = 0.24
"""Virtual seconds that `busy` takes without failures, and a little more."""

TICK = float(os.environ.get("FAILOVER_TICK", "0.0554"))
MISFORTUNES = ("kill:0", "kill:1", "kill:2", "restart:1", "break:1")


def embed(tokens: list[int]) -> Rows:
    """Values that survive float32 unchanged."""
    return [[(token * (n + 3) % 4096) / 4096 for n in range(4)] for token in tokens]


async def busy(session: InferenceSession) -> None:
    """The prompts, and a bit of everything else; every output is checked."""
    reference = Reference(2)

    async def step(
        *tokens: list[int], starts: list[int] | None = None, sources: tuple[int, ...] = ()
    ) -> None:
        rows = [embed(each) for each in tokens]
        output = await session.step(
            hidden_states([row for each in rows for row in each]),
            list(map(len, rows)),
            starts=starts,
            sources=sources,
        )
        assert read_rows(output) == await reference.step(rows, starts=starts, sources=sources)

    await step(*PROMPTS)  # what is new of them, in chunks
    await step([1], [2])
    await step([3], [4], sources=(1, 0))
    await step([5], [6], starts=[40, 100])
    await step([7], [8])


async def survive(when: float, what: str, journal: str) -> tuple[int, ...]:
    async with swarm_of(*TWICE, delay=0.01) as swarm:
        session = await swarm.open(2, PROMPTS)
        await session.step(hidden_states(embed(PROMPTS[0] + PROMPTS[1])), list(map(len, PROMPTS)))
        await session.close()
        session = await swarm.open(2, PROMPTS, journal=journal, chunk_rows=6)

        async def fail() -> None:
            await asyncio.sleep(when)
            kind, stage = what.split(":")
            await befall(swarm, session, kind, int(stage))

        failing = asyncio.create_task(fail())
        await busy(session)
        failing.cancel()
        await asyncio.gather(failing, return_exceptions=True)
        await session.close()
        for server in swarm.servers:
            while not server.dead and (server.service.sessions or server.engine.cache_tokens_used):
                await asyncio.sleep(0.01)
        return session.cached


@pytest.mark.parametrize("journal", ["client", "servers"])
@pytest.mark.parametrize("what", MISFORTUNES)
def test_a_failure_at_every_moment(what: str, journal: str) -> None:
    for moment in range(int(SPAN_OF_TIME / TICK)):
        cached = run_on_virtual_time(survive(moment * TICK, what, journal))
        assert cached == (128, 64)

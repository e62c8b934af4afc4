"""Failures, drains and moves at every moment of a session with several drafted chunks under way.

`WINDOW_SEEDS=0:1000` tries more of them.
"""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from drafted_text import DraftedText
from memory_swarm import Swarm, befall, quiet, swarm_of

from swarmcore.client.session.session import InferenceSession
from swarmcore.testing.clock import run as run_on_virtual_time
from swarmcore.testing.faulty import Faults

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
CHUNKS = 14
SPAN_OF_TIME = 0.5
"""Virtual seconds that so many chunks take, about."""

FIRST, LAST = map(int, os.environ.get("WINDOW_SEEDS", "0:36").split(":"))
EVENTS = ("kill", "kill", "restart", "break", "drain")


async def drained(swarm: Swarm, session: InferenceSession, stage: int) -> None:
    """The server of a stage leaves in good order, and another one comes."""
    peers = session.chain.peers[stage : stage + 1]
    for server in [server for server in swarm.servers if server.peer in peers and not server.dead]:
        await server.registry.withdraw()
        await swarm.add(str(server.executor.span))
        await server.service.drain(30)


async def survive(seed: int, journal: str, sequences: int) -> tuple[int, int, int]:
    """Failovers, chunks called back by the client, steps dropped by servers."""
    chance = random.Random(seed)
    events = [
        (SPAN_OF_TIME * chance.random(), chance.choice(EVENTS), chance.randrange(3))
        for _ in range(chance.choice([1, 1, 2, 3]))
    ]
    if journal == "off":
        events = [(when, "drain", stage) for when, _, stage in events]
    async with swarm_of(*TWICE, seed=seed, delay=chance.choice([0.002, 0.01])) as swarm:
        for server in swarm.servers:
            server.executor.step_seconds = chance.choice([0.0, 0.003, 0.01])
        jitter = chance.choice([0.0, 0.04])
        swarm.client_transport.faults = Faults(delay=chance.choice([0.002, 0.01, 0.03]), jitter=jitter)
        session = await swarm.open(sequences, journal=journal, chunk_rows=chance.choice([4, 256]))
        draining: list[asyncio.Task[None]] = []

        async def befalls(when: float, kind: str, stage: int) -> None:
            await asyncio.sleep(when)
            if kind == "drain":
                draining.append(asyncio.create_task(drained(swarm, session, stage)))
            else:
                await befall(swarm, session, kind, stage)

        happening = [asyncio.create_task(befalls(*event)) for event in events]
        text = DraftedText(session, seed, depth=chance.randint(1, 4))
        await text.prompt(*[21, 3, 7][:sequences])
        await text.go_on(CHUNKS)
        await text.end()
        for task in happening:
            task.cancel()
        await asyncio.gather(*happening, return_exceptions=True)
        await session.close()
        async with asyncio.timeout(100):
            await quiet(swarm)
            await asyncio.gather(*draining)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("session")]
        dropped = sum(server.service.counters["steps_recalled"] for server in swarm.servers)
        return len(swarm.failovers), text.recalls, dropped


@pytest.mark.parametrize(
    ("journal", "sequences"), [("client", 1), ("servers", 1), ("client", 3), ("servers", 3)]
)
def test_whatever_happens_what_is_kept_is_what_one_model_gives(journal: str, sequences: int) -> None:
    runs = [
        run_on_virtual_time(survive(seed, journal, sequences))
        for seed in range(FIRST + sequences % 4, LAST, 4)
    ]
    failovers, recalls, dropped = map(sum, zip(*runs, strict=True))
    assert failovers > len(runs) / 2 and recalls > len(runs) and dropped > len(runs)


def test_without_a_journal_servers_may_still_leave() -> None:
    runs = [run_on_virtual_time(survive(seed, "off", 3)) for seed in range(FIRST, LAST, 6)]
    assert sum(failovers for failovers, *_ in runs) > len(runs) / 2

"""Servers that are slow, hang or lack memory: progress counts, and a lone holder is asked, not replaced."""

from __future__ import annotations

import asyncio

import pytest
from memory_swarm import Run, Swarm, quiet, swarm_of

from swarmcore.errors import DeadlineExceededError, ServerMemoryError
from swarmcore.testing.executor import hidden_states

pytestmark = pytest.mark.virtual_time


def slow(swarm: Swarm, tokens_a_second: float) -> None:
    for server in swarm.servers:
        server.executor.step_seconds = 1 / tokens_a_second


def steps_computed(swarm: Swarm) -> int:
    return sum(server.service.counters["steps_computed"] for server in swarm.servers)


@pytest.mark.parametrize("journal", ["client", "servers", "off"])
@pytest.mark.parametrize("speed", [1.0, 3.0, 10.0, 1e2, 1e3, 1e4, 1e5])
async def test_progress_counts_whatever_its_speed(speed: float, journal: str) -> None:
    async with swarm_of("0:6", "6:12", delay=0.01) as swarm:
        slow(swarm, speed)
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(300)
        for _ in range(3):
            await run.step(1)
        assert session.failovers == 0
        assert steps_computed(swarm) == 2 * (2 + 3), "each chunk and each token once on each server"
        await session.close()
        await quiet(swarm)


async def test_a_slow_server_is_kept_while_it_gets_on_although_another_is_there() -> None:
    async with swarm_of("0:12", "0:12", delay=0.01) as swarm:
        slow(swarm, 1.0)
        session = await swarm.open()
        await Run.of(session).step(200)
        assert session.failovers == 0
        await session.close()
        await quiet(swarm)


async def test_eight_sessions_wait_their_turn_at_a_slow_lone_server() -> None:
    async with swarm_of("0:12", delay=0.01) as swarm:
        slow(swarm, 2.0)
        sessions = [await swarm.open() for _ in range(8)]
        await asyncio.gather(*(Run.of(session, i).step(40) for i, session in enumerate(sessions)))
        assert sum(session.failovers for session in sessions) == 0
        assert steps_computed(swarm) == 8
        for session in sessions:
            await session.close()
        await quiet(swarm)


async def test_a_lone_server_that_hangs_is_told_of_and_never_replaced_by_itself() -> None:
    async with swarm_of("0:12", delay=0.01) as swarm:
        session = await swarm.open(step_timeout=10, patience=15)
        run = Run.of(session)
        await run.step(5)
        [server] = swarm.servers
        server.executor.gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(DeadlineExceededError, match="gave up after 15 s"):
            await session.step(hidden_states([[1.0] * 4]), [1])
        assert 10 < loop.time() - start < 40
        assert session.failovers == 0
        server.executor.gate.set()
        await run.step(1)
        assert session.failovers == 0
        await session.close()
        await quiet(swarm)


async def test_a_server_that_hangs_is_replaced_where_there_is_another() -> None:
    async with swarm_of("0:12", "0:12", delay=0.01) as swarm:
        session = await swarm.open(step_timeout=10)
        run = Run.of(session)
        await run.step(5)
        hung = swarm.serving(session, 0)
        hung.executor.gate = asyncio.Event()
        await run.step(1)
        assert session.chain.peers[0] != hung.peer and session.failovers == 1
        hung.executor.gate.set()
        await session.close()
        await quiet(swarm)


async def test_a_lone_server_that_is_out_of_reach_for_a_while_goes_on_where_it_was() -> None:
    async with swarm_of("0:12", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        [server] = swarm.servers
        server.transport.partition()
        step = asyncio.create_task(run.step(1))
        await asyncio.sleep(7)  # less than transports take to give a connection up
        server.transport.heal()
        await step
        assert session.failovers == 0, "its caches were there all the time"
        await session.close()
        await quiet(swarm)


async def test_a_replay_that_does_not_fit_is_tried_again_in_smaller_pieces_and_not_at_once() -> None:
    async with swarm_of("0:6", "6:12", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(100)
        await swarm.serving(session, 1).kill()
        [other] = [s for s in swarm.servers if not s.dead and s.executor.span.end == 12]
        other.executor.failures.extend(ServerMemoryError("no memory") for _ in range(2))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await run.step(1)
        assert 3 <= loop.time() - start < 10, "one second, then two"
        assert max(sum(batch) for batch in list(other.executor.batches)[2:]) <= 64
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize("when", ["in a replay", "in a step"])
async def test_memory_that_stays_short_ends_the_step_with_the_reason(when: str) -> None:
    async with swarm_of("0:6", "6:12", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(20)
        doomed = swarm.serving(session, 1)
        [other] = [s for s in swarm.servers if s is not doomed and s.executor.span.end == 12]
        if when == "in a replay":
            await doomed.kill()
            short = other
        else:
            other.dead, short = True, doomed
            await other.registry.withdraw()
        attempts = 100
        short.executor.failures.extend(ServerMemoryError("no memory") for _ in range(attempts))
        with pytest.raises(ServerMemoryError, match="no memory; gave up after 60 s"):
            await session.step(hidden_states([[1.0] * 4]), [1])
        assert 4 <= attempts - len(short.executor.failures) <= 8
        short.executor.failures.clear()
        await run.step(1)
        await session.close()
        other.dead = False
        await quiet(swarm)


async def test_servers_that_are_all_short_of_memory_are_not_tried_in_turns() -> None:
    async with swarm_of("0:6", "6:12", "6:12", "6:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(20)
        short = [server for server in swarm.servers if server.executor.span.end == 12]
        attempts = 100
        for server in short:
            server.executor.failures.extend(ServerMemoryError("no memory") for _ in range(attempts))
        with pytest.raises(ServerMemoryError, match="no memory; gave up after 60 s"):
            await session.step(hidden_states([[1.0] * 4]), [1])
        assert sum(attempts - len(server.executor.failures) for server in short) <= 10
        for server in short:
            server.executor.failures.clear()
        await run.step(1)
        await session.close()
        await quiet(swarm)

"""Failures at every moment of a busy session: prefill in chunks, decode, beams, rollback."""

from __future__ import annotations

import asyncio

import pytest
from memory_swarm import Run, Server, Swarm, quiet, swarm_of

from swarmcore.client.session import InferenceSession
from swarmcore.testing.clock import run as run_on_virtual_time

TWICE = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
DELAY = 0.010
SPAN_OF_TIME = 0.33
"""Virtual seconds that `busy` takes, a little more than; every failure comes at one of these moments."""


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
                await misfortune(swarm, session, kind, int(stage))

        failing = asyncio.create_task(fail())
        await busy(session)
        swarm_took = asyncio.get_running_loop().time() - start
        failing.cancel()
        await asyncio.gather(failing, return_exceptions=True)
        await session.close()
        await quiet(swarm)
        assert swarm_took < 60
    return swarm


async def misfortune(swarm: Swarm, session: InferenceSession, kind: str, stage: int) -> None:
    if stage >= len(session.chain):
        return
    peer = session.chain.peers[stage]
    server = next((s for s in swarm.servers if s.peer == peer and not s.dead), None)
    if server is None:
        return
    match kind:
        case "kill":
            await server.kill()
            await swarm.add(str(server.executor.span))
        case "restart":  # comes back with the same identity and no caches
            await server.kill()
            await swarm.add(str(server.executor.span), identity=server.node.identity)
        case "break":  # the connections only; the server lives on
            server.transport.break_connections()
        case "unlink":  # one server loses the way to the next one
            other: Server | None = next(
                (s for s in swarm.servers if s.peer in session.chain.peers[stage + 1 :] and not s.dead), None
            )
            if other is not None:
                server.transport.partition(other.peer)
        case "hang":
            server.transport.partition()
            await server.registry.withdraw()


@pytest.mark.parametrize("journal", ["client", "servers"])
@pytest.mark.parametrize("kind", ["kill", "restart", "break"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_at_every_moment(journal: str, kind: str, stage: int) -> None:
    failovers = 0
    for tick in range(int(SPAN_OF_TIME / 0.005)):
        moment = [(tick * 0.005, f"{kind}:{stage}")]
        failovers += len(run_on_virtual_time(survive(moment, journal)).failovers)
    assert failovers > SPAN_OF_TIME / 0.005 / 2


@pytest.mark.parametrize("journal", ["client", "servers"])
@pytest.mark.parametrize("second", ["kill:0", "kill:1", "kill:2"])
def test_another_one_at_every_moment_after(journal: str, second: str) -> None:
    """The second failure hits the recovery from the first: its search, its replay, its resending."""
    for tick in range(60):
        moments = [(0.145, "kill:1"), (0.145 + tick * 0.002, second)]
        swarm = run_on_virtual_time(survive(moments, journal))
        assert swarm.failovers

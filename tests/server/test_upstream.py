"""Who may push into a session: the stage before it as its client names it, and nobody else."""

from __future__ import annotations

import asyncio

import pytest
from memory_swarm import Run, quiet, swarm_of

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.testing.executor import hidden_states
from swarmcore.types import short
from swarmcore.wire.messages import CachePart, JoinSession, Step
from swarmcore.wire.protocols import INFERENCE_PROTOCOL

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_who_knows_the_id_of_a_session_and_is_not_named_is_not_let_in(journal: str) -> None:
    async with swarm_of("0:6", "6:12", delay=0.01) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(3)
        for index, stage in enumerate(session._pipeline.stages):
            server, joining = swarm.serving(session, index), JoinSession(stage.opened.hop.session)
            computed = server.engine.counters["steps"]
            for record in (Step(9, (3,), (1,)), Step(0, (0,), (1,), replay=True), CachePart(0, 0, 1)):
                pushed = await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, joining)
                await pushed.send(record, hidden_states([[0.5] * 4]))
                with pytest.raises(InvalidStepError, match=r"does not let .* push into it"):
                    await pushed.receive()
            assert server.engine.counters["steps"] == computed
        for _ in range(3):
            await run.step(1)
        assert not swarm.failovers
        await session.close()
        await quiet(swarm)


async def test_a_stage_that_was_replaced_is_shown_out_of_the_one_behind_it() -> None:
    async with swarm_of("0:4", "4:8", "8:12", "4:8", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        old, after = swarm.serving(session, 1), swarm.serving(session, 2)
        [behind] = after.service._sessions.values()
        assert behind.upstream.allows(old.peer)
        assert len(behind.upstream._connected) == 1
        await old.kill()
        for _ in range(3):
            await run.step(1)
        new = swarm.serving(session, 1)
        assert new is not old
        assert list(behind.upstream._connected.values()) == [new.peer]
        assert not behind.upstream.allows(old.peer)
        [hosted] = new.service._sessions.values()
        assert hosted.upstream.allows(swarm.serving(session, 0).peer)
        await session.close()
        await quiet(swarm)


async def test_a_server_that_has_handed_its_caches_over_is_shown_out() -> None:
    async with swarm_of("0:4", "4:8", "8:12", "4:8", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        leaving, after = swarm.serving(session, 1), swarm.serving(session, 2)
        draining = asyncio.create_task(leaving.service.drain(30))
        for _ in range(3):
            await run.step(1)
        await draining
        assert [failover.how for failover in swarm.failovers] == ["handed over"]
        [behind] = after.service._sessions.values()
        assert (
            repr(behind.upstream) == f"<AllowedUpstream 1 here · {short(swarm.serving(session, 1).peer)} may>"
        )
        await session.close()
        await quiet(swarm)


async def test_who_waits_to_be_let_in_is_told_when_the_session_closes() -> None:
    async with swarm_of("0:12") as swarm:
        session = await swarm.open()
        [stage], server = session._pipeline.stages, swarm.serving(session, 0)
        joining = JoinSession(stage.opened.hop.session)
        pushed = await swarm.client.open(server.node.addresses, INFERENCE_PROTOCOL, joining)
        await asyncio.sleep(1)
        await session.close()
        with pytest.raises(SessionLostError, match="closed"):
            await pushed.receive()
        await quiet(swarm)

"""Servers vanish at every moment of a session; what comes out is what comes out without it."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from memory_swarm import Run, quiet, swarm_of

from swarmcore.errors import (
    InvalidStepError,
    MissingBlocksError,
    RemoteFaultError,
    UnavailableError,
)
from swarmcore.resources import Bounds, Machine, Resource, ResourceLimits, ResourceManager
from swarmcore.routing.chain import Chain, Stage
from swarmcore.testing.executor import hidden_states
from swarmcore.types import Span

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


async def test_two_stages_die_together_neighbours_and_not() -> None:
    for first, second in ((0, 1), (1, 2), (0, 2)):
        async with swarm_of(*TWICE) as swarm:
            session = await swarm.open()
            run = Run.of(session)
            await run.step(6)
            doomed = [swarm.serving(session, first), swarm.serving(session, second)]
            for server in doomed:
                await server.kill()
            await run.step(1)
            await run.step(1)
            assert session.failovers == (2 if second - first == 2 else 1)
            await session.close()
            await quiet(swarm)


@MODES
async def test_all_servers_of_the_chain_die(journal: str) -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(6)
        for stage in range(3):
            await swarm.serving(session, stage).kill()
        await run.step(1)
        await session.close()
        await quiet(swarm)


@MODES
async def test_several_servers_take_over_for_one_and_one_for_several(journal: str) -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(5)
        for blocks in ("3:5", "5:6", "6:9"):
            await swarm.add(blocks)
        await swarm.serving(session, 1).kill()
        await run.step(1)
        assert [str(stage.span) for stage in session.chain.stages] == ["0:4", "4:5", "5:6", "6:8", "8:12"]
        await run.step(2)
        await swarm.add("2:9")
        doomed = [swarm.serving(session, stage) for stage in (1, 2, 3)]
        for server in doomed:
            await server.kill()
        await run.step(1)
        assert [str(stage.span) for stage in session.chain.stages] == ["0:4", "4:8", "8:12"]
        await run.step(1)
        await session.close()
        await quiet(swarm)


@MODES
async def test_a_server_that_hangs_is_found_by_its_silence(journal: str) -> None:
    async with swarm_of(*TWICE, delay=0.01) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(5)
        hung = swarm.serving(session, 1)
        hung.transport.partition()
        loop = asyncio.get_running_loop()
        start = loop.time()
        await run.step(1)
        assert loop.time() - start < 6
        hung.transport.heal()  # and comes back, with whatever it still had to say
        for _ in range(4):
            await run.step(1)
        await session.close()
        await quiet(swarm)


async def test_a_server_that_loses_the_way_to_the_next_one_is_carried_for() -> None:
    async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        first, second = swarm.serving(session, 0), swarm.serving(session, 1)
        first.transport.partition(second.peer)
        for _ in range(3):
            await run.step(1)
        assert session.failovers == 0 or session.chain.peers[0] == first.peer
        await session.close()
        first.transport.heal()
        await quiet(swarm)


@pytest.mark.parametrize("stage", [0, 1, 2])
@MODES
async def test_what_servers_had_no_room_to_keep_is_made_anew(journal: str, stage: int) -> None:
    async with swarm_of() as swarm:
        for blocks in TWICE:
            limits = ResourceLimits.of(Machine(1024, 2**30))
            limits = attrs.evolve(limits, bytes=Bounds(2**30, 8, 2**30, 2**30))
            await swarm.add(blocks, resources=ResourceManager(limits))
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        for _ in range(3):
            await run.step(4)
        serving = [swarm.serving(session, each) for each in range(3)]
        assert all(server.service.counters["answers_dropped"] for server in serving)
        assert all(server.node.resources.used(Resource.BYTES) <= 8 for server in serving)
        await serving[stage].kill()
        await run.step(4)
        await run.step(1)
        assert session.failovers >= 1
        await session.close()
        await quiet(swarm)
        assert not any(server.node.resources.used(Resource.BYTES) for server in swarm.servers)


@MODES
async def test_a_server_that_forgot_its_session_gets_it_back(journal: str) -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(5)
        server = swarm.serving(session, 1)
        server.engine.close_session(session._pipeline.stages[1].opened.hop.session)
        await run.step(1)
        assert session.failovers == 1
        assert session.chain.peers[1] == server.peer, "nobody else has its blocks"
        await run.step(1)
        await session.close()
        await quiet(swarm)


class ThereAndBack:
    """A router that passes through the first server of the view twice."""

    def plan(self, view, model, span, **_) -> Chain:
        whole = next(server for server in view if server.span == Span(0, 12))
        middle = next(server for server in view if server.span == Span(4, 8))
        if span == Span(4, 8):
            return Chain((Stage(middle, span),))
        if span != Span(0, 12):
            return Chain((Stage(whole, span),))
        return Chain((Stage(whole, Span(0, 4)), Stage(middle, Span(4, 8)), Stage(whole, Span(8, 12))))


@MODES
async def test_a_server_that_the_chain_passes_twice_is_lost_twice(journal: str) -> None:
    async with swarm_of("0:12", "4:8", router=ThereAndBack()) as swarm:
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await run.step(5)
        await swarm.serving(session, 1).kill()
        await swarm.add("4:8")
        await run.step(1)
        await swarm.serving(session, 0).kill()
        await swarm.add("0:12")
        await run.step(1)
        await run.step(1)
        assert session.failovers == 3
        await session.close()
        await quiet(swarm)


async def test_patience_has_an_end_and_the_session_can_be_taken_up_after_it() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open(patience=7)
        run = Run.of(session)
        await run.step(5)
        doomed = swarm.serving(session, 1)
        await doomed.kill()
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(MissingBlocksError, match=r"4:8.*after 7 s") as caught:
            await session.step(hidden_states([[1.0] * 4]), [1])
        assert 5 < loop.time() - start < 9
        assert caught.value.ranges == ["4:8"]
        await swarm.add("4:8")
        await run.step(1)
        await session.close()
        await quiet(swarm)


async def test_a_holder_that_comes_within_patience_is_waited_for() -> None:
    async with swarm_of("0:4", "4:8", "8:12") as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        await swarm.serving(session, 1).kill()
        step = asyncio.create_task(run.step(1))
        await asyncio.sleep(20)
        assert not step.done()
        await swarm.add("4:8")
        await step
        await session.close()
        await quiet(swarm)


@MODES
@pytest.mark.parametrize("sources", [(), (1, 0)])
async def test_a_step_cancelled_anywhere_leaves_the_session_usable(journal: str, sources: tuple) -> None:
    for tick in range(1, 40):
        async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
            session = await swarm.open(2, journal=journal, chunk_rows=3)
            run = Run.of(session)
            await run.step(4, 6)
            step = session.step(hidden_states([[0.5] * 4] * 7), [3, 4], sources=sources)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(tick * 0.0007):
                    await step
            # Whatever of it got through before stays; the rest never was.
            kept = session.positions
            assert kept == (4, 6) or (sources and kept == (6, 4))
            run.reference.rows = [run.reference.rows[s] for s in (sources if kept == (6, 4) else (0, 1))]
            await run.step(1, 1)
            await run.step(2, 0)
            await session.close()
            await quiet(swarm)


async def test_a_refused_step_is_the_callers_and_changes_nothing() -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        with pytest.raises(InvalidStepError):
            await session.step(hidden_states([[float("nan")] * 4]), [1])
        await run.step(1)
        assert session.failovers == 0
        await session.close()


async def test_a_step_that_brings_down_every_server_is_given_up() -> None:
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open()
        await Run.of(session).step(2)
        for server in swarm.servers:
            server.executor.failures.extend(RuntimeError("out of luck") for _ in range(100))
        with pytest.raises(RemoteFaultError):
            await session.step(hidden_states([[1.0] * 4]), [1])
        await session.close()


async def test_a_failover_is_told_in_one_clear_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with swarm_of(*TWICE) as swarm:
        session = await swarm.open()
        run = Run.of(session)
        await run.step(5)
        await swarm.serving(session, 1).kill()
        await run.step(1)
        (failover,) = swarm.failovers
        assert str(failover) in caplog.text
        assert "[4:8] left the session (" in str(failover)
        assert "5 tokens replayed in" in str(failover)
        assert "1 failover>" in repr(session)
        await session.close()

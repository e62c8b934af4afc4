"""A session stays with servers that compute alike, and says so when it could not."""

from __future__ import annotations

import logging
import random

import pytest
from chain_world import adapter_of
from memory_swarm import Run, Swarm, quiet, swarm_of

from swarmcore.client.session.planner import SessionPlanner
from swarmcore.errors import MissingBlocksError
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.types import Numerics, short

pytestmark = pytest.mark.virtual_time

ONE, OTHER = Numerics.parse("torch/bf16"), Numerics.parse("ggml/q4_k_m/f32/f16")


async def two_of_each(swarm: Swarm) -> None:
    for way in ONE, OTHER:
        for blocks in "0:6", "6:12":
            await swarm.add(blocks, numerics=way)


def by_latency() -> LeastLatency:
    return LeastLatency(random.Random(3))


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_session_and_its_replacements_compute_alike_while_they_can(stage: int) -> None:
    async with swarm_of(router=by_latency()) as swarm:
        await two_of_each(swarm)
        session = await swarm.open()
        assert len(session.numerics) == 1
        (way,) = session.numerics
        spare = await swarm.add(f"{6 * stage}:{6 * stage + 6}", numerics=way)
        run = Run.of(session)
        await run.step(5)
        await swarm.serving(session, stage).kill()
        await run.step(1)
        assert session.chain.peers[stage] == spare.peer
        assert session.numerics == (way,)
        assert [each.numerics for each in swarm.failovers] == [""]
        await spare.kill()
        await run.step(1)
        changed = swarm.failovers[-1]
        assert session.numerics == ((ONE, OTHER) if way == ONE else (OTHER, ONE))
        assert changed.numerics == f"{way} to {session.numerics[1]}"
        assert f"by other numerics: {changed.numerics}" in str(changed)
        await session.close()
        await quiet(swarm)


async def test_a_chain_of_two_kinds_is_taken_and_told_where_there_is_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with swarm_of(router=by_latency()) as swarm:
        await swarm.add("0:6", numerics=ONE)
        await swarm.add("6:12", numerics=OTHER)
        with caplog.at_level(logging.INFO, "swarmcore.client.session"):
            session = await swarm.open()
        run = Run.of(session)
        await run.step(3)
        assert session.numerics == (ONE, OTHER)
        told = [each for each in caplog.messages if f"several ways: {ONE}, {OTHER}" in each]
        assert len(told) == 1
        await session.close()


async def test_no_live_session_changes_its_numerics_for_speed() -> None:
    async with swarm_of(router=by_latency()) as swarm:
        slow = await swarm.add("0:12", numerics=ONE)
        session = await swarm.open()
        await swarm.add("0:12", numerics=OTHER)
        assert swarm.planner.compare(session.chain) is not None
        await slow.registry.announce(slow.info("draining"), 3600)
        assert swarm.planner.compare(session.chain) is None
        await session.close()


async def test_sessions_with_an_adapter_pass_by_servers_that_take_none() -> None:
    async with swarm_of("0:6") as swarm:
        able = await swarm.add("6:12")
        unable = await swarm.add("6:12", numerics=OTHER, capabilities=())
        adapter = adapter_of()
        planner = SessionPlanner(able.registry, by_latency(), PeerHealth(), COUNTING_MODEL, adapter=adapter)
        assert planner.plan(COUNTING_MODEL.span).peers == (swarm.servers[0].peer, able.peer)
        await able.kill()
        with pytest.raises(MissingBlocksError) as refused:
            planner.plan(COUNTING_MODEL.span)
        assert "only servers that take adapters" in refused.value.message
        assert f"have no adapters: {short(unable.peer)} 6:12 ({OTHER})" in refused.value.message

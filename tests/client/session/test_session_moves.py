"""Live sessions move to a much better chain, once, and only if it pays."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest
from drafted_text import DraftedText
from memory_swarm import Run, Server, quiet, swarm_of

from swarmcore.routing.chain import Chain, Stage
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.session.move_policy import MoveLimits
from swarmcore.types import PeerId, ServerInfo, Span

pytestmark = pytest.mark.virtual_time


async def announce(server: Server, tokens_per_second: float) -> None:
    """Say that a token takes so long there."""
    info = attrs.evolve(server.info(), decode_rps=tokens_per_second, forward_rps=100 * tokens_per_second)
    await server.registry.announce(info, 3600)


async def talk(run: Run, seconds: int) -> None:
    for _ in range(seconds):
        await run.step(1)
        await asyncio.sleep(1)


@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_a_session_moves_to_a_server_that_is_much_faster(journal: str) -> None:
    async with swarm_of("0:4", "4:12", router=LeastLatency(random.Random(1))) as swarm:
        for server in swarm.servers:
            await announce(server, 10)
        session = await swarm.open(journal=journal)
        run = Run.of(session)
        await talk(run, 70)
        assert session.failovers == 0
        fast = await swarm.add("4:12")
        await announce(fast, 100)
        await talk(run, 30)
        assert session.chain.peers == (swarm.servers[0].peer, fast.peer)
        (move,) = swarm.failovers
        assert "ms a token elsewhere" in move.reason
        await announce(fast, 2)
        await talk(run, 30)
        assert len(swarm.failovers) == 1, "it has moved a moment ago"
        await talk(run, 60)
        assert session.chain.peers[1] == swarm.servers[1].peer
        await session.close()
        await quiet(swarm)


async def test_a_little_better_is_not_worth_it() -> None:
    async with swarm_of("0:12", "0:12", router=LeastLatency(random.Random(1))) as swarm:
        await announce(swarm.servers[0], 10)
        await announce(swarm.servers[1], 1)
        session = await swarm.open()
        run = Run.of(session)
        await announce(swarm.servers[1], 11)
        await talk(run, 150)
        assert swarm.failovers == []
        await session.close()


async def test_a_chain_that_dies_while_it_is_moved_to_costs_nothing() -> None:
    for tick in range(30):
        async with swarm_of("0:6", "6:12", delay=0.01, router=LeastLatency(random.Random(1))) as swarm:
            for server in swarm.servers:
                await announce(server, 10)
            limits = MoveLimits(hold=0.0, interval=0.0)
            session = await swarm.open(moves=limits)
            run = Run.of(session)
            await run.step(3)
            fast = await swarm.add("6:12")
            await announce(fast, 1000)
            await talk(run, 16)
            assert session.chain.peers[1] == fast.peer
            faster = await swarm.add("4:12")
            await announce(fast, 5)
            await announce(faster, 1000)
            while not len(session._moves.tasks):
                await asyncio.sleep(1)
                await run.step(1)
            await asyncio.sleep(tick * 0.005)
            await faster.kill()
            await talk(run, 3)
            await session.close()
            await quiet(swarm)


def chain_of(*stages: tuple[str, str]) -> Chain:
    return Chain(
        tuple(
            Stage(ServerInfo(PeerId(peer), (), span=Span.parse(blocks)), Span.parse(blocks))
            for peer, blocks in stages
        )
    )


def test_only_what_differs_is_replaced() -> None:
    current = chain_of(("a", "0:4"), ("b", "4:6"), ("c", "6:8"), ("d", "8:12"))
    better = chain_of(("a", "0:4"), ("x", "4:8"), ("e", "8:12"))
    parts = current.replacements(better)
    assert [(first, last, new.peers) for first, last, new in parts] == [(3, 3, ("e",)), (1, 2, ("x",))]
    assert current.replacements(current) == []
    shifted = chain_of(("y", "0:5"), ("z", "5:12"))
    assert [(first, last) for first, last, _ in current.replacements(shifted)] == [(0, 3)]
    assert current.replacements(chain_of(("a", "0:4"), ("b", "4:6"), ("c", "6:12")))[0][:2] == (2, 3)


@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_a_session_moves_with_drafts_under_way(journal: str) -> None:
    router = LeastLatency(random.Random(1))
    async with swarm_of("0:4", "4:12", delay=0.01, router=router) as swarm:
        for server in swarm.servers:
            await announce(server, 10)
        session = await swarm.open(journal=journal, moves=MoveLimits(hold=0.0, interval=0.0))
        text = DraftedText(session, 3, depth=4)
        await text.prompt(5)
        await text.go_on(5)
        fast = await swarm.add("4:12")
        await announce(fast, 1000)
        while session.chain.peers[1] != fast.peer:
            await text.go_on(1)
            await asyncio.sleep(2)
        await text.go_on(20)
        await text.end()
        assert text.recalls > 3 and len(swarm.failovers) == 1
        await session.close()
        await quiet(swarm)

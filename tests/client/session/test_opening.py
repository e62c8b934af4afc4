"""What a user is told when no session can be opened: the cause, who it comes from, and the cure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import attrs
import pytest
from memory_swarm import Server, quiet, swarm_of

from swarmcore.errors import (
    CacheFullError,
    DeadlineExceededError,
    MissingBlocksError,
    ModelMismatchError,
    PeerNotAllowedError,
    PeerUnreachableError,
    ServerDrainingError,
    SpanError,
    SwarmError,
)
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.memory import MemoryTransport
from swarmcore.types import Span

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize(
    ("blocks", "missing"),
    [((), "0:12"), (("0:4", "8:12"), "4:8"), (("0:4", "5:6", "8:10"), "4:5, 6:8, 10:12")],
)
async def test_blocks_that_nobody_holds(blocks: tuple[str, ...], missing: str) -> None:
    async with swarm_of(*blocks) as swarm:
        with pytest.raises(MissingBlocksError) as caught:
            await swarm.open()
        assert f"no server holds blocks {missing} of counting" in caught.value.message
        assert f"swarmcore serve --model MODEL --blocks {missing.split(',')[0]}" in caught.value.message
        assert caught.value.ranges == missing.split(", ")
        await quiet(swarm)


async def full(server: Server) -> None:
    server.engine._kv_cache.max_sessions = 1
    await server.engine.open("f" * 32, 1, 0, timeout=1)


async def closed(server: Server) -> None:
    server.node.allowed_peers = frozenset([server.peer])


async def leaving(server: Server) -> None:
    server.service.draining = True


async def moved(server: Server) -> None:
    server.service.span = Span(4, 6)


async def dead(server: Server) -> None:
    inner = server.transport.inner
    assert isinstance(inner, MemoryTransport)
    await inner.crash()


async def hung(server: Server) -> None:
    server.transport.partition()


async def of_other_weights(server: Server) -> None:
    server.service._model = attrs.evolve(COUNTING_MODEL, fingerprint="e" * 64)


STATES = [
    (full, CacheFullError, "try again in"),
    (closed, PeerNotAllowedError, "ask its owner to allow"),
    (leaving, ServerDrainingError, "takes no new sessions"),
    (moved, SpanError, "this server holds 4:6"),
    (dead, PeerUnreachableError, "nobody listens"),
    (hung, DeadlineExceededError, "no session was granted in 5 s"),
    (of_other_weights, ModelMismatchError, "holds other weights"),
]


@pytest.mark.parametrize(("state", "error", "message"), STATES)
async def test_the_only_server_of_some_blocks_refuses(
    state: Callable, error: type[SwarmError], message: str
) -> None:
    async with swarm_of("0:4", "4:8", "8:12", router=LeastLatency(random.Random(0))) as swarm:
        await state(swarm.servers[1])
        with pytest.raises(error, match=rf"^12D3….*{message}.*nobody else has blocks 4:8"):
            await swarm.open(open_timeout=5)
        await asyncio.sleep(1)
        for server in (swarm.servers[0], swarm.servers[2]):
            assert server.counts() == (0, 0, 0), "nothing stays open on the others"


@pytest.mark.parametrize(("state", "error", "message"), STATES)
async def test_another_one_takes_its_place(state: Callable, error: type[SwarmError], message: str) -> None:
    async with swarm_of("0:4", "4:8", "8:12", "4:8", router=LeastLatency(random.Random(0))) as swarm:
        await state(swarm.servers[1])
        session = await swarm.open(open_timeout=5)
        assert session.chain.peers[1] == swarm.servers[3].peer
        await session.close()


async def test_a_session_shows_its_state() -> None:
    async with swarm_of("0:6", "6:12") as swarm:
        session = await swarm.open(2)
        chain = " → ".join(f"{str(s.peer)[:4]}…{str(s.peer)[-6:]} [{s.executor.span}]" for s in swarm.servers)
        assert repr(session) == f"<InferenceSession counting {chain} · pos 0,0>"
        await session.close()
        assert repr(session) == f"<InferenceSession counting {chain} · closed>"
        await quiet(swarm)

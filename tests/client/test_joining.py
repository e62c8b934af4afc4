"""A swarm is joined, on one event loop, before it is used; whatever else is tried says so at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from swarmcore import connect, sync
from swarmcore.client.swarm import Swarm
from swarmcore.errors import InputError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, hidden_states
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import Span

NOBODY = f"tcp://127.0.0.1:1/{Identity.generate().peer}"

Use = Callable[[Swarm], Awaitable[Any]]


async def _view(swarm: Swarm) -> None:
    swarm.view()


async def _chain(swarm: Swarm) -> None:
    swarm.chain(COUNTING_MODEL)


async def _batches(swarm: Swarm) -> None:
    swarm.batch_runner(COUNTING_MODEL)


async def _chat(swarm: Swarm) -> None:
    async for _ in swarm.chat().say("Hello"):
        pass


async def _generate(swarm: Swarm) -> None:
    await swarm.generate("Hello")


USES: dict[str, Use] = {
    "view": _view,
    "chain": _chain,
    "batch_runner": _batches,
    "chat": _chat,
    "generate": _generate,
    "load_model": lambda swarm: swarm.load_model("nowhere"),
    "open_session": lambda swarm: swarm.open_session(COUNTING_MODEL),
    "wait_for_blocks": lambda swarm: swarm.wait_for_blocks(COUNTING_MODEL, timeout=1000),
    "info": lambda swarm: swarm.info(Identity.generate().peer),
}


@asynccontextmanager
async def around() -> AsyncIterator[tuple[Swarm, BlockServer]]:
    """A client that has not joined yet, and a server of all blocks."""
    network, directory, identity = MemoryNetwork(), MemoryDirectory(), Identity.generate()
    async with Node(identity, [network.transport(identity)]) as node:
        registry = MemoryRegistry(node.peer, directory)
        await registry.start()
        config = ServerConfig(model="counting")
        async with BlockServer(
            config, node, registry, CountingExecutor(Span(0, 12)), cache_tokens=400
        ) as server:
            identity = Identity.generate()
            client = Node(identity, [network.transport(identity, listen=False)])
            yield Swarm(client, MemoryRegistry(client.peer, directory), rng=Random(0)), server
        await registry.close()


def on_another_loop(work: Callable[[], Coroutine[Any, Any, Any]]) -> Coroutine[Any, Any, Any]:
    return asyncio.to_thread(lambda: asyncio.run(work()))


@pytest.mark.parametrize("use", USES)
async def test_a_swarm_that_was_never_joined_says_so(use: str) -> None:
    swarm = connect(NOBODY)
    assert "not joined" in repr(swarm)
    with pytest.raises(InputError, match=r"never joined.*await swarmcore.connect"):
        await USES[use](swarm)


async def test_awaiting_joins() -> None:
    async with around() as (unjoined, server):
        swarm = await unjoined
        assert swarm is unjoined
        assert set(swarm.view().servers) == {server.node.peer}
        async with (
            swarm as again,
            await again.open_session(COUNTING_MODEL) as session,
        ):  # joins no second time
            assert session.chain.peers == (server.node.peer,)
        assert "closed" in repr(swarm)
        with pytest.raises(InputError, match="closed; connect again"):
            await swarm


async def test_awaiting_a_swarm_that_nobody_answers_for_closes_it() -> None:
    swarm = connect(NOBODY)
    with pytest.raises(PeerUnreachableError):
        await swarm
    assert "closed" in repr(swarm)


@pytest.mark.parametrize("use", ["load_model", "open_session", "wait_for_blocks", "info"])
async def test_another_threads_loop_is_told_at_once(use: str) -> None:
    async with around() as (unjoined, server), unjoined as swarm:

        async def elsewhere() -> None:
            async with asyncio.timeout(10):
                work = swarm.info(server.node.peer) if use == "info" else USES[use](swarm)
                with pytest.raises(InputError, match=r"another event loop.*swarmcore\.sync"):
                    await work

            with pytest.raises(InputError, match="another event loop"):
                await swarm.close()

        await on_another_loop(elsewhere)
        assert (await swarm.info(server.node.peer)).server.peer == server.node.peer


async def test_a_session_is_of_one_loop() -> None:
    async with (
        around() as (unjoined, _),
        unjoined as swarm,
        await swarm.open_session(COUNTING_MODEL) as session,
    ):
        row = hidden_states([[0.5] * COUNTING_MODEL.hidden_size])

        async def elsewhere() -> None:
            with pytest.raises(InputError, match="another event loop"):
                await session.step(row, [1])

        await on_another_loop(elsewhere)
        assert (await session.step(row, [1])).shape == row.shape


async def test_joined_on_one_loop_awaited_on_another() -> None:
    async with around() as (unjoined, _), unjoined as swarm:

        async def elsewhere() -> None:
            with pytest.raises(InputError, match="another event loop"):
                await swarm

        await on_another_loop(elsewhere)


def test_the_synchronous_face_joins_by_itself() -> None:
    with pytest.raises(PeerUnreachableError):
        sync.connect(NOBODY)

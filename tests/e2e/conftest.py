"""Real swarms: server processes with the real small model, shared by the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

import swarmcore
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess

Serve = Callable[..., Awaitable[ServerProcess]]


@pytest.fixture(scope="session")
def serve(fork_server: ForkServer) -> Serve:
    """Starts a server of some blocks in float32: ``await serve(folder, "0:10", "--bootstrap", address)``."""

    async def start_server(model: Path, blocks: str, *more: str) -> ServerProcess:
        return await fork_server.start(
            "serve",
            *("--model", str(model), "--blocks", blocks, "--dtype", "float32", "--threads", "1"),
            *("--listen", "127.0.0.1:0", "--cache-tokens", "4096"),
            *more,
        )

    return start_server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def three_servers(serve: Serve, smollm2_folder: Path) -> AsyncIterator[list[ServerProcess]]:
    """Three servers, a third of the blocks each, that know each other."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await serve(smollm2_folder, "0:10"))
        others = await asyncio.gather(
            *(serve(smollm2_folder, blocks, "--bootstrap", first.address) for blocks in ("10:20", "20:30"))
        )
        for server in others:
            await stack.enter_async_context(server)
        yield [first, *others]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def swarm(three_servers: list[ServerProcess]) -> AsyncIterator[swarmcore.Swarm]:
    """A client's connection to the three servers."""
    async with swarmcore.connect(three_servers[0].address) as swarm:
        yield swarm


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def model(swarm: swarmcore.Swarm, smollm2_folder: Path) -> swarmcore.RemoteModel:
    """The real model over the three servers."""
    model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
    await swarm.wait_for_blocks(model.info, timeout=30)
    return model

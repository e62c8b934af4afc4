"""Real swarms: server processes with the real small model, shared by the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
import torch

import swarmcore
from swarmcore.testing.processes import ServerProcess

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


Serve = Callable[..., Awaitable[ServerProcess]]


async def start_server(model: Path, blocks: str, *more: str) -> ServerProcess:
    """A server of this machine's loopback with ``blocks`` of ``model`` in float32."""
    return await ServerProcess.start(
        "serve",
        *("--model", str(model), "--blocks", blocks, "--dtype", "float32", "--threads", "1"),
        *("--listen", "127.0.0.1:0", "--cache-tokens", "4096"),
        *more,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Starts a server: ``await serve(folder, "0:10", "--bootstrap", address)``."""
    return start_server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three_servers(smollm2_folder: Path) -> AsyncIterator[list[ServerProcess]]:
    """Three servers, a third of the blocks each, that know each other."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await start_server(smollm2_folder, "0:10"))
        others = await asyncio.gather(
            *(start_server(smollm2_folder, b, "--bootstrap", first.address) for b in ("10:20", "20:30"))
        )
        for server in others:
            await stack.enter_async_context(server)
        yield [first, *others]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(three_servers: list[ServerProcess]) -> AsyncIterator[swarmcore.Swarm]:
    """A client's connection to the three servers."""
    async with swarmcore.connect(three_servers[0].address) as swarm:
        yield swarm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(swarm: swarmcore.Swarm, smollm2_folder: Path) -> swarmcore.RemoteModel:
    """The real model over the three servers."""
    model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
    await swarm.wait_for_blocks(model.info, timeout=30)
    return model


@pytest.fixture(scope="session")
def plain_model(smollm2_folder: Path) -> torch.nn.Module:
    """The whole model in this process, as plain Transformers runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()

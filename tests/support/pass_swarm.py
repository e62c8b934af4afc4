"""Forward and backward passes over servers in memory, and what they give without a network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from memory_swarm import Server, Swarm, swarm_of

from swarmcore.client.adapters import AdapterWeights
from swarmcore.executor.base import TrainingBatch, TrainingPass
from swarmcore.routing.chain import Stage
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values
from swarmcore.types import Span

LENGTHS = (3, 1, 4)
KEEP = "0123456789abcdef" * 2


def some_rows(seed: int, count: int = sum(LENGTHS)) -> Rows:
    rng = random.Random(seed)
    return [[rng.randrange(-512, 512) / 512 for _ in range(4)] for _ in range(count)]


def stage(server: Server, blocks: str = "") -> Stage:
    return Stage(server.info(), Span.parse(blocks) if blocks else server.executor.span)


async def alone(
    rows: Rows,
    gradients: Rows,
    lengths: tuple[int, ...] = LENGTHS,
    span: str = "0:12",
    weights: AdapterWeights | None = None,
) -> tuple[Rows, Rows, dict[str, list[float]]]:
    """Outputs, gradients of the inputs and of the weights, without any network."""
    executor = CountingExecutor()
    adapter = None
    if weights is not None:
        tensors = [tensor for each in weights.tensors.values() for tensor in each]
        adapter = await executor.load_adapter(tensors, weights.scaling)
    batch = TrainingBatch(Span.parse(span), lengths, hidden_states(rows), adapter)
    there = executor.forward(batch)
    back = executor.backward(batch, hidden_states(gradients), weights=adapter is not None)
    work: TrainingPass
    for work in (there, back):
        while not await work.advance(10**6):
            pass
    assert back.gradients is not None
    named = {tensor.name: read_values(tensor) for tensor in back.weights}
    return read_rows(there.outputs), read_rows(back.gradients), named


async def quiet(swarm: Swarm) -> None:
    """Wait until nothing is left of any pass but kept activations; fail when something stays."""
    async with asyncio.timeout(30):
        for server in swarm.servers:
            queue = server.engine.training.queue
            while (
                server.passes.under_way
                or len(queue)
                or queue.admitted_tokens
                or server.adapters.in_use
                or len(server.executor.passes) != len(server.engine.training.activations)
            ):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def one_server(delay: float = 0.0, **options: Any) -> AsyncIterator[tuple[Swarm, Server]]:
    async with swarm_of(delay=delay) as swarm:
        server = await swarm.add("0:12", **options)
        yield swarm, server
        await quiet(swarm)

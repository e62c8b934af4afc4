"""A whole block server with forward and backward passes and adapters: what it announces, how it moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from small_adapters import adapter_tensors

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.rpc import MicroBatch, backward, forward
from swarmcore.client.swarm import Swarm
from swarmcore.errors import AdapterError, InputError, ServerDrainingError, SpanError, SwarmError
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.routing.chain import Stage
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import Weights
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.testing.rows import hidden_states
from swarmcore.types import Span
from swarmcore.wire.forward_backward import AdapterName, OpenForward, Rows
from swarmcore.wire.protocols import FORWARD_PROTOCOL

ROWS = hidden_states([[0.5, 0.25, -0.5, 1.0]] * 6)
KEEP = "0123456789abcdef" * 2

pytestmark = pytest.mark.virtual_time


async def read(folder: str, span: Span) -> Weights:
    if folder != "/adapters/poet":
        raise AdapterError(f"nothing in {folder}")
    return Weights(adapter_tensors(blocks=[block for block in (2, 5, 8) if block in span]))


@asynccontextmanager
async def served(blocks: str, **settings: Any) -> AsyncIterator[tuple[BlockServer, Swarm]]:
    network, directory, identity = MemoryNetwork(), MemoryDirectory(), Identity.generate()
    async with Node(identity, [network.transport(identity)]) as node:
        registry = MemoryRegistry(node.peer, directory)
        await registry.start()
        config = ServerConfig(model="counting", **settings)
        executor = CountingExecutor(Span.parse(blocks))
        server = BlockServer(config, node, registry, executor, cache_tokens=400, read_adapter=read)
        other = Identity.generate()
        client = Node(other, [network.transport(other, listen=False)])
        async with server, Swarm(client, MemoryRegistry(client.peer, directory)) as swarm:
            yield server, swarm
        assert not executor.passes
        await registry.close()


def stage(server: BlockServer, blocks: str) -> Stage:
    return Stage(server.info, Span.parse(blocks))


async def test_what_it_can_do_is_announced_and_what_it_did_is_counted() -> None:
    settings = {"max_pass_tokens": 100, "adapters": {"poet": "/adapters/poet"}}
    async with served("0:12", **settings) as (server, swarm):
        [info] = swarm.view()
        assert (info.pass_tokens, info.adapters) == (100, ("poet",))
        assert server.notes[1:] == ("adapters: poet",)
        server.node._transports["memory"].notes = lambda: ["memory: out of reach"]  # type: ignore[method-assign]
        assert server.notes[1:] == ("adapters: poet", "memory: out of reach")
        batch, here = MicroBatch((2, 4), AdapterWeights(AdapterName(name="poet"))), stage(server, "0:12")
        await forward(swarm.node, COUNTING_MODEL, here, batch, ROWS, keep=KEEP)
        await backward(swarm.node, COUNTING_MODEL, here, batch, ROWS, ROWS, kept_as=KEEP)
        counters = (await swarm.info(server.node.peer)).counters
        expected = {"forwards": 1, "backwards": 1, "pass_tokens": 12, "kept_hits": 1, "passes_served": 2}
        assert {name: counters[name] for name in expected} == expected


async def test_a_move_ends_passes_on_blocks_that_leave_and_takes_the_adapters_along() -> None:
    async with served("0:8", drain=1.0, adapters={"poet": "/adapters/poet"}) as (server, swarm):
        assert isinstance(server.executor, CountingExecutor)
        server.executor.pass_seconds = 0.1
        batch = MicroBatch((2, 4))
        leaving, staying = (
            asyncio.create_task(forward(swarm.node, COUNTING_MODEL, stage(server, blocks), batch, ROWS))
            for blocks in ("0:8", "4:8")
        )
        await asyncio.sleep(0.5)
        await server.move_to(Span(4, 12))
        with pytest.raises(ServerDrainingError):
            await leaving
        await staying
        server.executor.pass_seconds = 0.0
        poet = MicroBatch((2, 4), AdapterWeights(AdapterName(name="poet")))
        with_it = await forward(swarm.node, COUNTING_MODEL, stage(server, "8:9"), poet, ROWS)
        without = await forward(swarm.node, COUNTING_MODEL, stage(server, "8:9"), batch, ROWS)
        assert with_it.outputs.data != without.outputs.data
        with pytest.raises(SpanError):
            await forward(swarm.node, COUNTING_MODEL, stage(server, "3:9"), batch, ROWS)


async def test_a_pass_whose_blocks_leave_before_its_rows_are_there_can_go_elsewhere() -> None:
    async with served("0:8", drain=1.0) as (server, swarm):
        opening = OpenForward(COUNTING_MODEL.fingerprint, 0, 4, (2, 4))
        channel = await swarm.node.open(server.node.addresses, FORWARD_PROTOCOL, opening)
        await asyncio.sleep(0.1)
        await server.move_to(Span(4, 12))
        await channel.send(Rows("inputs", 0), ROWS)
        with pytest.raises(ServerDrainingError):
            await channel.receive()
        await channel.close()


async def test_a_server_that_leaves_finishes_its_passes() -> None:
    async with served("0:12", drain=60.0) as (server, swarm):
        assert isinstance(server.executor, CountingExecutor)
        server.executor.pass_seconds = 0.1
        here, batch = stage(server, "0:12"), MicroBatch((2, 4))
        going = asyncio.create_task(forward(swarm.node, COUNTING_MODEL, here, batch, ROWS, keep=KEEP))
        await asyncio.sleep(1)
        leaving = asyncio.create_task(server.leave())
        await asyncio.sleep(0.1)
        with pytest.raises(ServerDrainingError):
            await forward(swarm.node, COUNTING_MODEL, here, batch, ROWS)
        assert (await going).outputs.shape == (6, 4)
        await leaving


async def test_settings_that_cannot_work() -> None:
    with pytest.raises(AdapterError, match="nothing in /elsewhere"):
        async with served("0:12", adapters={"poet": "/elsewhere"}):
            pass
    wrong: tuple[dict[str, Any], ...] = (
        {"adapters": {"": "x"}},
        {"adapters": {"a\n": "x"}},
        {"adapters": {"a" * 65: "x"}},
        {"adapter_budget": -1},
        {"activation_budget": -1},
        {"max_pass_tokens": -1},
    )
    for settings in wrong:
        with pytest.raises(InputError):
            ServerConfig(model="counting", **settings)


async def test_a_server_that_runs_no_passes_says_so() -> None:
    async with served("0:12", max_pass_tokens=0) as (server, swarm):
        assert server.info.pass_tokens == 0
        with pytest.raises(SwarmError, match="runs no forward and backward passes"):
            await forward(swarm.node, COUNTING_MODEL, stage(server, "0:12"), MicroBatch((2, 4)), ROWS)

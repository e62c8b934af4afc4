"""A server with a real executor of a tiny model, on a network in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from swarmcore.checkpoint import open_checkpoint
from swarmcore.engine.engine import Engine
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.resources import ResourceManager
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.forward_backward import ForwardBackwardService
from swarmcore.server.inference import InferenceService
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL, INFERENCE_PROTOCOL


@asynccontextmanager
async def torch_server(
    folder: Path, *, adapter_budget: int = 2**20, resources: ResourceManager | None = None
) -> AsyncIterator[tuple[Node, MemoryNetwork, ModelInfo]]:
    """At the end nothing is held for anybody."""
    network = MemoryNetwork()
    identity = Identity.from_seed(b"s" * 32)
    executor = await asyncio.to_thread(
        TorchExecutor.load, open_checkpoint(str(folder)), Span(0, 5), dtype="float32", threads=1
    )
    engine = Engine(executor, cache_tokens=4096)
    await engine.start()
    resources = resources or ResourceManager()
    adapters = AdapterStore(executor, adapter_budget, resources)
    async with Node(identity, [network.transport(identity)], resources=resources) as node:
        registry = MemoryRegistry(node.peer, MemoryDirectory())
        await registry.start()
        inference = InferenceService(
            engine, executor.model, executor.span, node, registry, admission_timeout=0.2, adapters=adapters
        )
        passes = ForwardBackwardService(engine, executor.model, executor.span, adapters, resources)
        node.serve_protocol(INFERENCE_PROTOCOL, inference.serve)
        node.serve_protocol(FORWARD_PROTOCOL, passes.forward)
        node.serve_protocol(BACKWARD_PROTOCOL, passes.backward)
        try:
            yield node, network, executor.model
        finally:
            await registry.close()
            await node.close()
            await engine.close()
            await executor.close()
            assert engine.cache_tokens_used == 0
            assert not any(use.used for use in node.resources.snapshot())

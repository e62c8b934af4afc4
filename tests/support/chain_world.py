"""Servers of several chains in memory, whose passes can be watched and broken, and work for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
from fewest_servers import FewestServers

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import BatchPlanner
from swarmcore.client.autograd.rpc import MicroBatch
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.engine.engine import Engine
from swarmcore.executor.base import TrainingBatch
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.routing.health import PeerHealth
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.forward_backward import ForwardBackwardService
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.testing.forward_backward import CountingAdapter
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values, tensor_of
from swarmcore.types import PeerId, ServerInfo, Span
from swarmcore.wire.forward_backward import AdapterName
from swarmcore.wire.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL
from swarmcore.wire.tensors import Tensor

WIDTH = COUNTING_MODEL.hidden_size
WHOLE = Span(0, COUNTING_MODEL.blocks)
LENGTHS = ((3, 1), (4,), (2, 2), (5,))
OWN = "5" * 32


@attrs.define(eq=False)
class Server:
    node: Node
    engine: Engine
    service: ForwardBackwardService
    store: AdapterStore
    registry: MemoryRegistry
    transport: MemoryTransport
    passes: int = 0
    """Begun here."""

    @property
    def peer(self) -> PeerId:
        return self.node.peer

    async def die(self) -> None:
        await self.transport.crash()
        await self.registry.withdraw()


class World:
    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.network, self.directory = MemoryNetwork(), MemoryDirectory()
        self.servers: dict[PeerId, Server] = {}
        self.client = Node(self._identity(), [])
        self.begun: Callable[[Server, str], object] = lambda server, way: None
        """Called when a pass begins on a server, and may kill it."""

    def _identity(self) -> Identity:
        return Identity.from_seed(self.random.randbytes(32))

    async def add(
        self,
        blocks: str,
        *,
        speed: float = 100.0,
        pass_tokens: int = 64,
        able: tuple[str, ...] = ("training", "adapters"),
    ) -> Server:
        identity = self._identity()
        transport = self.network.transport(identity)
        node = Node(identity, [transport])
        await node.start()
        executor = CountingExecutor(Span.parse(blocks))
        engine = Engine(executor, cache_tokens=64)
        await engine.start()
        store = AdapterStore(executor, 1 << 20)
        service = ForwardBackwardService(engine, COUNTING_MODEL, executor.span, store)
        server = Server(node, engine, service, store, MemoryRegistry(node.peer, self.directory), transport)

        async def forward(channel: object) -> None:
            server.passes += 1
            await asyncio.sleep(0)
            self.begun(server, "forward")
            await service.forward(channel)  # type: ignore[arg-type]

        async def backward(channel: object) -> None:
            self.begun(server, "backward")
            await service.backward(channel)  # type: ignore[arg-type]

        node.serve_protocol(FORWARD_PROTOCOL, forward)
        node.serve_protocol(BACKWARD_PROTOCOL, backward)
        await server.registry.start()
        info = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            model=COUNTING_MODEL,
            span=executor.span,
            forward_rps=speed,
            pass_tokens=pass_tokens,
            numerics="fake/f32",
            capabilities=able,
        )
        await server.registry.announce(info, 3600)
        self.servers[node.peer] = server
        return server

    def runner(self, **options: object) -> BatchRunner:
        registry, health = MemoryRegistry(self.client.peer, self.directory), PeerHealth()
        sessions = SessionPlanner(registry, FewestServers(self.random), health, COUNTING_MODEL)
        planner = BatchPlanner(registry, health, COUNTING_MODEL, sessions)
        return BatchRunner(self.client, planner, COUNTING_MODEL, PassOptions(**options))  # type: ignore[arg-type]

    async def close(self) -> None:
        await self.client.close()
        for server in self.servers.values():
            await server.registry.close()
            await server.node.close()
            await server.engine.close()


@asynccontextmanager
async def world_of(*blocks: str, seed: int = 0) -> AsyncIterator[World]:
    world = World(seed)
    world.client = Node(world._identity(), [world.network.transport(world._identity())])
    await world.client.start()
    try:
        for each in blocks:
            await world.add(each)
        yield world
        # Nothing is left of any pass, whatever happened.
        assert not any(server.service.under_way for server in world.servers.values())
    finally:
        await world.close()


def adapter_of(seed: int = 3) -> AdapterWeights:
    rng = random.Random(seed)

    def weights(name: str, *shape: int) -> Tensor:
        return tensor_of(name, [rng.uniform(-0.5, 0.5) for _ in range(shape[0] * shape[1])], shape)

    return AdapterWeights(
        AdapterName(version=OWN),
        0.5,
        {
            block: (
                weights(f"{block}.self_attn.q_proj.lora_A", 2, WIDTH),
                weights(f"{block}.self_attn.q_proj.lora_B", WIDTH, 2),
            )
            for block in (1, 7)
        },
    )


@attrs.define(eq=False)
class Work:
    """Micro-batches, and what the whole model in one place makes of them."""

    batches: list[tuple[MicroBatch, Tensor]]
    gradients: list[Tensor]
    adapter: AdapterWeights | None

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, ...]] = LENGTHS, adapter: AdapterWeights | None = None) -> Work:
        rng = random.Random(5)

        def rows(count: int) -> Tensor:
            return hidden_states([[rng.uniform(-1, 1) for _ in range(WIDTH)] for _ in range(count)])

        batches = [(MicroBatch(each, adapter), rows(sum(each))) for each in lengths]
        return cls(batches, [rows(batch.rows) for batch, _ in batches], adapter)

    async def expected(self) -> list[tuple[Rows, Rows, dict[str, list[float]]]]:
        executor = CountingExecutor()
        adapter: CountingAdapter | None = None
        if self.adapter is not None:
            tensors = [tensor for found in self.adapter.tensors.values() for tensor in found]
            adapter = await executor.load_adapter(tensors, self.adapter.scaling)  # type: ignore[assignment]
        results = []
        for (batch, rows), gradients in zip(self.batches, self.gradients, strict=True):
            whole = TrainingBatch(WHOLE, batch.lengths, rows, adapter)
            forward = executor.forward(whole)
            while not await forward.advance(1000):
                pass
            back = executor.backward(whole, gradients, weights=adapter is not None)
            while not await back.advance(1000):
                pass
            assert back.gradients is not None
            weights = {tensor.name: read_values(tensor) for tensor in back.weights}
            results.append((read_rows(forward.outputs), read_rows(back.gradients), weights))
        return results

    async def check(self, runner: BatchRunner) -> None:
        """Forward and back through the swarm; it is what it would be in one place, to the last bit."""
        contexts = await runner.forward(WHOLE, self.batches, needs_backward=True)
        backs = await runner.backward(contexts, self.gradients, weights=self.adapter is not None)
        for way, back, (outputs, gradients, weights) in zip(
            contexts, backs, await self.expected(), strict=True
        ):
            assert read_rows(way.outputs) == outputs
            assert back.gradients is not None and read_rows(back.gradients) == gradients
            assert {tensor.name: read_values(tensor) for tensor in back.weights} == weights

"""Batches over several chains in memory, with exact arithmetic: shared by speed, redone after failures."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

from swarmcore.client.adapter_weights import AdapterWeights
from swarmcore.client.micro_batches import BatchRunner, PassOptions
from swarmcore.client.pass_codecs import PassCodecs
from swarmcore.client.pass_planner import PassPlanner
from swarmcore.client.passes import Batch
from swarmcore.client.planner import SwarmPlanner
from swarmcore.errors import (
    AdapterNotFoundError,
    InvalidBatchError,
    MissingBlocksError,
    UnknownCodecError,
)
from swarmcore.executor.engine import Engine
from swarmcore.executor.passes import SequenceBatch
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.routing.chain import Chain, FewestServers
from swarmcore.routing.health import PeerHealth
from swarmcore.routing.link_codec import LinkCodec, Rung, Way
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.passes import PassService
from swarmcore.server.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.testing.passes import CountingAdapter
from swarmcore.testing.rows import Rows, hidden_states, read_rows, read_values, tensor_of
from swarmcore.types import PeerId, ServerInfo, Span
from swarmcore.wire.passes import AdapterName
from swarmcore.wire.tensors import ITEM_BYTES, Tensor, register_codec

pytestmark = pytest.mark.virtual_time

WIDTH = COUNTING_MODEL.hidden_size
WHOLE = Span(0, COUNTING_MODEL.blocks)
LENGTHS = ((3, 1), (4,), (2, 2), (5,))
OWN = "5" * 32


@attrs.define(eq=False)
class Server:
    node: Node
    engine: Engine
    service: PassService
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

    async def add(self, blocks: str, *, speed: float = 100.0, pass_tokens: int = 64) -> Server:
        identity = self._identity()
        transport = self.network.transport(identity)
        node = Node(identity, [transport])
        await node.start()
        executor = CountingExecutor(Span.parse(blocks))
        engine = Engine(executor, cache_tokens=64)
        await engine.start()
        store = AdapterStore(executor, 1 << 20)
        service = PassService(engine, COUNTING_MODEL, executor.span, store)
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
        )
        await server.registry.announce(info, 3600)
        self.servers[node.peer] = server
        return server

    def runner(self, **options: object) -> BatchRunner:
        registry, health = MemoryRegistry(self.client.peer, self.directory), PeerHealth()
        sessions = SwarmPlanner(registry, FewestServers(self.random), health, COUNTING_MODEL)
        planner = PassPlanner(registry, health, COUNTING_MODEL, sessions)
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

    batches: list[tuple[Batch, Tensor]]
    gradients: list[Tensor]
    adapter: AdapterWeights | None

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, ...]] = LENGTHS, adapter: AdapterWeights | None = None) -> Work:
        rng = random.Random(5)

        def rows(count: int) -> Tensor:
            return hidden_states([[rng.uniform(-1, 1) for _ in range(WIDTH)] for _ in range(count)])

        batches = [(Batch(each, adapter), rows(sum(each))) for each in lengths]
        return cls(batches, [rows(batch.rows) for batch, _ in batches], adapter)

    async def expected(self) -> list[tuple[Rows, Rows, dict[str, list[float]]]]:
        executor = CountingExecutor()
        adapter: CountingAdapter | None = None
        if self.adapter is not None:
            tensors = [tensor for found in self.adapter.tensors.values() for tensor in found]
            adapter = await executor.load_adapter(tensors, self.adapter.scaling)  # type: ignore[assignment]
        results = []
        for (batch, rows), gradients in zip(self.batches, self.gradients, strict=True):
            whole = SequenceBatch(WHOLE, batch.lengths, rows, adapter)
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
        ways = await runner.forward(WHOLE, self.batches, way_back=True)
        backs = await runner.backward(ways, self.gradients, weights=self.adapter is not None)
        for way, back, (outputs, gradients, weights) in zip(ways, backs, await self.expected(), strict=True):
            assert read_rows(way.outputs) == outputs
            assert back.gradients is not None and read_rows(back.gradients) == gradients
            assert {tensor.name: read_values(tensor) for tensor in back.weights} == weights


async def test_several_chains_give_what_one_model_gives() -> None:
    async with world_of("0:6", "6:12", "0:4", "4:12") as world:
        runner = world.runner()
        await Work.of().check(runner)
        assert runner.redone == 0
        assert all(server.passes for server in world.servers.values())


@pytest.mark.parametrize("keep", [True, False])
async def test_with_and_without_kept_activations(keep: bool) -> None:
    async with world_of("0:6", "6:12") as world:
        await Work.of(adapter=adapter_of()).check(world.runner(keep=keep))


async def test_work_is_shared_out_by_speed() -> None:
    async with world_of() as world:
        slow = await world.add("0:12", speed=50)
        fast = await world.add("0:12", speed=150)
        runner = world.runner(in_flight=2)
        runner.planner.worked = lambda stage, kind, tokens, seconds: None  # type: ignore[method-assign]
        await runner.forward(WHOLE, Work.of([(2,)] * 40).batches)
        assert (slow.passes, fast.passes) == (10, 30)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("nth", range(8))
async def test_a_server_dies_at_every_pass(way: str, nth: int) -> None:
    async with world_of("0:6", "6:12", "0:6", "6:9", "9:12") as world:
        begun = 0
        deaths: list[asyncio.Task[None]] = []

        def begin(server: Server, at: str) -> None:
            nonlocal begun
            begun += at == way
            if begun == nth + 1 and not deaths:
                deaths.append(asyncio.create_task(server.die()))

        world.begun = begin
        # The fallback for blocks 6:12 are two servers for one, so inner inputs have to be computed again.
        runner = world.runner(patience=5)
        await world.add("0:12", speed=1)
        await Work.of(adapter=adapter_of()).check(runner)
        assert len(deaths) == 1 or begun <= nth + 1
        await asyncio.gather(*deaths)


async def test_a_stage_that_two_servers_go_back_through_is_planned_once() -> None:
    async with world_of("0:12") as world:
        [whole] = world.servers.values()
        runner, work = world.runner(), Work.of([(3, 1)])
        ways = await runner.forward(WHOLE, work.batches, way_back=True)
        await whole.die()
        for blocks in ("0:4", "4:8", "8:12"):
            await world.add(blocks)
        planned: list[Span] = []
        chain = runner.planner.chain

        def noted(span: Span, **options: Any) -> Chain:
            planned.append(span)
            return chain(span, **options)

        runner.planner.chain = noted  # type: ignore[method-assign]
        [back] = await runner.backward(ways, work.gradients)
        [(_, gradients, _)] = await work.expected()
        assert back.gradients is not None and read_rows(back.gradients) == gradients
        assert planned == [WHOLE]


async def test_an_adapter_travels_once_to_each_server() -> None:
    async with world_of("0:6", "6:12") as world:
        work = Work.of([(2,)] * 12, adapter_of())
        sent: list[tuple[int, ...]] = []
        assert work.adapter is not None
        send = AdapterWeights.send

        async def counted(self: AdapterWeights, channel: object, blocks: Sequence[int]) -> None:
            sent.append(tuple(blocks))
            await send(self, channel, blocks)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AdapterWeights, "send", counted)
            await work.check(world.runner())
        assert sorted(sent) == [tuple(range(6)), tuple(range(6, 12))]


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_codec_that_a_server_does_not_know_is_tried_once(way: Way) -> None:
    async with world_of("0:6", "6:12") as world:
        ladder = (Rung("of tomorrow", 1),)
        links = LinkCodec(ladders={"activations": ladder, "gradients": ladder})
        for peer in world.servers:  # slow ones
            links.transferred(peer, way, 1000, 1e6, 0)
            links.computed(peer, "activations", (1,), 1e-6, 0)
            links.computed(peer, "gradients", (1,), 1e-6, 0)
        runner = world.runner(codec="auto")
        runner.codecs = PassCodecs("auto", links)
        await Work.of().check(runner)
        runner.codecs = PassCodecs("of tomorrow")
        with pytest.raises(UnknownCodecError, match="of tomorrow"):
            await Work.of().check(runner)


class Backwards:
    """A codec that loses nothing."""

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(data)[::-1])

    decode = encode

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * ITEM_BYTES[dtype]


async def test_another_server_does_not_know_the_codec_of_the_way_there() -> None:
    register_codec("backwards", Backwards())
    async with world_of("0:12") as world:
        [first] = world.servers.values()
        links = LinkCodec(ladders={"activations": (Rung("backwards", 1),), "gradients": ()})
        links.transferred(first.peer, "up", 1000, 1e6, 0)
        links.computed(first.peer, "activations", (1,), 1e-6, 0)
        runner, work = world.runner(codec="auto"), Work.of()
        runner.codecs = PassCodecs("auto", links)
        ways = await runner.forward(WHOLE, work.batches, way_back=True)
        assert [passed.codec for way in ways for passed in way.passed] == len(ways) * ["backwards"]

        second, refusals = await world.add("0:12"), 0

        async def decode(tensor: Tensor) -> Tensor:
            nonlocal refusals
            if tensor.codec == "backwards":
                refusals += 1
                raise UnknownCodecError("codec 'backwards' is not known here")
            return tensor.decode()

        second.engine.executor.decode = decode  # type: ignore[method-assign]
        await first.die()
        backs = await runner.backward(ways, work.gradients)
        for back, (_, gradients, _) in zip(backs, await work.expected(), strict=True):
            assert back.gradients is not None and read_rows(back.gradients) == gradients
        assert refusals


async def test_patience_ends_when_nobody_has_the_blocks() -> None:
    async with world_of("0:6") as world:
        before = asyncio.get_running_loop().time()
        with pytest.raises(MissingBlocksError, match="takes a share of block 6"):
            await world.runner(patience=3).forward(WHOLE, Work.of().batches)
        assert asyncio.get_running_loop().time() - before == pytest.approx(3)


async def test_a_server_that_comes_late_is_waited_for() -> None:
    async with world_of("0:6") as world:
        work = asyncio.create_task(Work.of().check(world.runner(patience=30)))
        await asyncio.sleep(5)
        assert not work.done()
        await world.add("6:12")
        await work


async def test_what_no_server_can_take_is_refused_at_once() -> None:
    async with world_of("0:12", "0:12") as world:
        poisoned = hidden_states([[float("nan")] * WIDTH] * 2)
        before = asyncio.get_running_loop().time()
        with pytest.raises(InvalidBatchError, match="finite"):
            await world.runner().forward(WHOLE, [(Batch((2,)), poisoned)])
        ways = await world.runner().forward(WHOLE, [(Batch((2,)), hidden_states([[1.0] * WIDTH] * 2))])
        with pytest.raises(InvalidBatchError, match="finite"):
            await world.runner().backward(ways, [poisoned])
        assert asyncio.get_running_loop().time() - before < 1


async def test_batches_that_are_too_large_or_want_an_unknown_adapter_find_nobody() -> None:
    async with world_of("0:12") as world:
        large = Work.of([(65,)])
        with pytest.raises(MissingBlocksError, match="0 servers take"):
            await world.runner(patience=0).forward(WHOLE, large.batches)
        unknown = Work.of([(2,)], AdapterWeights(AdapterName(name="poems")))
        with pytest.raises((MissingBlocksError, AdapterNotFoundError)):
            await world.runner(patience=0).forward(WHOLE, unknown.batches)


async def test_cancelling_leaves_nothing_behind() -> None:
    async with world_of("0:6", "6:12") as world:
        runner = world.runner()
        for moment in range(0, 40, 3):
            work = asyncio.create_task(Work.of(adapter=adapter_of()).check(runner))
            for _ in range(moment):
                await asyncio.sleep(0)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        while any(server.service.under_way for server in world.servers.values()):
            await asyncio.sleep(0.01)
        await Work.of().check(runner)

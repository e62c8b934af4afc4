"""A swarm that trains in a simulation: servers whose work is counted, a client whose batches are checked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.rpc import MicroBatch
from swarmcore.errors import SwarmError
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.rpc import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.sim.costs import BatchLoad, CostModel
from swarmcore.sim.executor import BACKWARD, SimExecutor
from swarmcore.sim.model import batch_numbers
from swarmcore.sim.peers import GossipSettings, ServerSettings, SimBootstrap, SimClient, SimServer
from swarmcore.sim.world import World
from swarmcore.types import Span


@attrs.frozen
class MicroBatches:
    """What every micro-batch is."""

    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    keep: bool = False
    """Whether servers keep activations, so that nothing is computed twice."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def load(self) -> BatchLoad:
        return BatchLoad.of_prompts(self.lengths)

    @property
    def forwards(self) -> float:
        """What one takes there and back, in forward passes."""
        return 1 + BACKWARD + (0 if self.keep else 1)

    def seconds(self, costs: CostModel, blocks: int) -> float:
        """Of one, there and back through a server of so many blocks, at the measured speed."""
        return self.forwards * costs.seconds(blocks, self.load)


class TrainingServer(SimServer):
    """A server that may announce another speed than its own, and whose work is counted over all its lives."""

    def __init__(
        self,
        world: World,
        name: str,
        span: Span,
        *,
        speed: float,
        stated: float = 1.0,
        megabits: float | None = None,
    ) -> None:
        settings = ServerSettings(measures_neighbours=False)
        super().__init__(world, name, _GOSSIP, span, settings=settings, speed=speed, megabits=megabits)
        self._held = span
        self._stated = stated
        self._executors: list[SimExecutor] = []  # of all its lives

    @property
    def throughput(self) -> float:
        return float(max(1, round(super().throughput * self._stated)))

    @property
    def busy_seconds(self) -> float:
        """At work on batches, since it first started."""
        return sum(executor.busy_seconds for executor in self._executors)

    def rate(self, work: MicroBatches) -> float:
        """Micro-batches per second that it can take there and back through its blocks."""
        return self.speed / work.seconds(self.world.measured.costs, len(self._held))

    def holds(self, block: int) -> bool:
        """Whether it serves ``block`` when it runs."""
        return block in self._held

    def _make(self, node: Node, registry: GossipRegistry, span: Span) -> BlockServer:
        server = super()._make(node, registry, span)
        assert isinstance(server.executor, SimExecutor)
        self._executors.append(server.executor)
        return server


class TrainingSwarm:
    """Servers, and one client that trains over them."""

    def __init__(self, world: World, servers: Sequence[TrainingServer], *, span: Span | None = None) -> None:
        self.world = world
        self.servers = servers
        self.span = span or Span(0, world.model.blocks)
        self.bootstrap = SimBootstrap(world, "bootstrap", _GOSSIP)

    async def start(self, options: PassOptions, *, megabits: float) -> BatchRunner:
        """Have everybody together; return what runs batches at the client, whose link has ``megabits``."""
        await self.bootstrap.start()
        for server in self.servers:
            await server.start([self.bootstrap.address])
        client = SimClient(self.world, "client", _GOSSIP, [self.bootstrap.address], megabits=megabits)
        await client.start()
        changes = client.swarm.registry.changes()
        while sum(info.state == "online" and bool(info.span) for info in client.swarm.view()) < len(
            self.servers
        ):
            await anext(changes)
        return client.swarm.batch_runner(self.world.model.info, options)

    def bound(self, work: MicroBatches, *, now: bool = False) -> float:
        """Micro-batches per second through the block whose holders are slowest together.

        Of all servers, or of those that are online ``now``.
        """
        servers = [server for server in self.servers if server.online or not now]
        return min(sum(server.rate(work) for server in servers if server.holds(block)) for block in self.span)


@attrs.define(eq=False)
class Trainer:
    """Sends micro-batches there and back, each with a name of its own, and checks what comes of every one."""

    world: World
    runner: BatchRunner
    work: MicroBatches
    span: Span
    checked: bool = True
    """Whether numbers come back as they are: a lossy codec leaves nothing of them."""
    begun: int = 0
    finished: list[float] = attrs.field(factory=list)
    """When each micro-batch was back."""
    names: Counter[int] = attrs.field(factory=Counter)
    """Whose gradients came back, how often."""
    problems: list[str] = attrs.field(factory=list)
    at: dict[int, Callable[[], None]] = attrs.field(factory=dict)
    """What to do when so many micro-batches are back."""

    async def step(self, many: int) -> None:
        """One step as a training loop takes it: all micro-batches forward, then all of them back."""
        names = range(self.begun, self.begun + many)
        self.begun += many
        model, tokens = self.world.model, self.work.tokens
        batch = MicroBatch(self.work.lengths, timeout=self.runner.options.timeout)
        try:
            ways = await self.runner.forward(
                self.span, [(batch, model.batch(name, tokens)) for name in names], needs_backward=True
            )
            backs = await self.runner.backward(ways, [model.batch(name, tokens) for name in names])
        except SwarmError as exc:
            self.problems.append(f"micro-batches {names.start} to {names.stop - 1} were lost: {exc}")
            return
        for name, back in zip(names, backs, strict=True):
            self.finished.append(self.world.now())
            if due := self.at.get(len(self.finished)):
                due()
            if not self.checked:
                continue
            assert back.gradients is not None
            found = batch_numbers(back.gradients)
            self.names[found[0]] += 1
            if found != model.gradient(name):
                self.problems.append(f"the gradients of micro-batch {name} came out wrong")

    async def streams(self, many: int, at_once: int) -> None:
        """So many micro-batches, one after the other in each of ``at_once`` streams."""
        last = self.begun + many

        async def stream() -> None:
            while self.begun < last:
                await self.step(1)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(stream())

    @property
    def lost(self) -> int:
        """Micro-batches of which nothing came back."""
        return self.begun - len(self.finished)

    @property
    def doubled(self) -> int:
        """Micro-batches whose gradients came back again."""
        return sum(count - 1 for count in self.names.values() if count > 1)


_GOSSIP = GossipSettings()

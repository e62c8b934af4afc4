"""A swarm in memory for tests of sessions: real client and server code, exact arithmetic for blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import attrs
from fewest_servers import FewestServers

from swarmcore.client.adapters import AdapterWeights
from swarmcore.client.session.options import Failover, SessionOptions
from swarmcore.client.session.planner import SessionPlanner
from swarmcore.client.session.session import InferenceSession, open_session
from swarmcore.engine.engine import Engine
from swarmcore.engine.training import TrainingLimits
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.identity import Identity
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.resources import ResourceManager
from swarmcore.routing.base import Router
from swarmcore.routing.health import PeerHealth
from swarmcore.rpc.node import Node
from swarmcore.server.adapters import AdapterStore
from swarmcore.server.forward_backward import ForwardBackwardService
from swarmcore.server.inference import InferenceService
from swarmcore.testing.executor import COUNTING_MODEL, CountingExecutor, Rows, hidden_states, read_rows
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.memory import MemoryNetwork, MemoryTransport
from swarmcore.types import Numerics, PeerId, ServerInfo, Span
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Caller
from swarmcore.wire.protocols import (
    BACKWARD_PROTOCOL,
    FORWARD_PROTOCOL,
    INFERENCE_PROTOCOL,
    PING_METHOD,
    SESSION_STATE_METHOD,
)

CACHE = 512
ADAPTER_BUDGET = 1 << 20


@attrs.define(eq=False)
class Server:
    """One server, its parts within reach."""

    node: Node
    transport: FaultyTransport
    executor: CountingExecutor
    engine: Engine
    service: InferenceService
    passes: ForwardBackwardService
    adapters: AdapterStore
    registry: MemoryRegistry
    dead: bool = False

    @property
    def peer(self) -> PeerId:
        return self.node.peer

    def info(self, state: str = "online") -> ServerInfo:
        return ServerInfo(
            peer=self.peer,
            addresses=tuple(map(str, self.node.addresses)),
            state=state,
            model=COUNTING_MODEL,
            span=self.executor.span,
            dtype="float32",
            cache_tokens=self.engine.cache_tokens,
            cache_tokens_free=self.engine.cache_tokens_free,
            pass_tokens=self.engine.training.limits.max_tokens,
            adapters=self.adapters.names,
            numerics=str(self.executor.numerics),
            capabilities=tuple(sorted(self.executor.capabilities)),
        )

    async def kill(self) -> None:
        """Vanish, as by SIGKILL; the directory hears of it."""
        self.dead = True
        inner = self.transport.inner
        assert isinstance(inner, MemoryTransport)
        await inner.crash()
        await self.registry.withdraw()
        await self.engine.close()

    def counts(self) -> tuple[int, int, int]:
        """Sessions, cached tokens and reserved tokens."""
        return self.service.sessions, self.engine.cache_tokens_used, self.executor.reserved_tokens


class Swarm:
    """Servers on one memory network, and a client."""

    def __init__(self, seed: int = 0, faults: Faults | None = None, router: Router | None = None) -> None:
        self.random = random.Random(seed)
        self.network = MemoryNetwork()
        self.directory = MemoryDirectory()
        self.servers: list[Server] = []
        self.strangers: list[Node] = []
        self.failovers: list[Failover] = []
        identity = self._identity()
        self.faults = faults or Faults()
        self.client_transport = FaultyTransport(self.network.transport(identity), self.random, self.faults)
        self.client = Node(identity, [self.client_transport])
        self.health = PeerHealth()
        self.planner = SessionPlanner(
            MemoryRegistry(self.client.peer, self.directory),
            router or FewestServers(random.Random(seed)),
            self.health,
            COUNTING_MODEL,
        )

    def _identity(self) -> Identity:
        return Identity.from_seed(self.random.randbytes(32))

    async def add(
        self,
        blocks: str,
        *,
        identity: Identity | None = None,
        cache: int = CACHE,
        limits: TrainingLimits | None = None,
        adapter_budget: int = ADAPTER_BUDGET,
        resources: ResourceManager | None = None,
        numerics: Numerics = CountingExecutor.numerics,
        capabilities: Collection[str] = CountingExecutor.capabilities,
        share_prefixes: bool = False,
    ) -> Server:
        identity = identity or self._identity()
        transport = FaultyTransport(self.network.transport(identity), self.random, self.faults)
        node = Node(identity, [transport], resources=resources)
        await node.start()
        executor = CountingExecutor(Span.parse(blocks))
        executor.numerics, executor.capabilities = numerics, frozenset(capabilities)
        engine = Engine(executor, cache_tokens=cache, training_limits=limits)
        await engine.start()
        adapters = AdapterStore(executor, adapter_budget)
        registry = MemoryRegistry(node.peer, self.directory)
        await registry.start()
        service = InferenceService(
            engine,
            COUNTING_MODEL,
            executor.span,
            node,
            registry,
            admission_timeout=0.5,
            adapters=adapters,
            share_prefixes=share_prefixes,
        )
        passes = ForwardBackwardService(engine, COUNTING_MODEL, executor.span, adapters)
        node.serve_protocol(INFERENCE_PROTOCOL, service.serve)
        node.serve_protocol(FORWARD_PROTOCOL, passes.forward)
        node.serve_protocol(BACKWARD_PROTOCOL, passes.backward)
        node.serve(PING_METHOD, _pong)
        node.serve(SESSION_STATE_METHOD, service.state)
        server = Server(node, transport, executor, engine, service, passes, adapters, registry)
        await registry.announce(server.info(), 3600)
        self.servers.append(server)
        return server

    async def another_client(self) -> Node:
        """A peer of its own; closed with the swarm."""
        identity = self._identity()
        node = Node(identity, [FaultyTransport(self.network.transport(identity), self.random, self.faults)])
        await node.start()
        self.strangers.append(node)
        return node

    def serving(self, session: InferenceSession, stage: int) -> Server:
        """The server of a stage of the session's chain."""
        peer = session.chain.peers[stage]
        return next(server for server in self.servers if server.peer == peer and not server.dead)

    async def open(
        self, sequences: int = 1, prompts: Sequence[Sequence[int]] = (), **options: object
    ) -> InferenceSession:
        return await open_session(
            self.client,
            self.planner,
            COUNTING_MODEL,
            sequences=sequences,
            prompts=prompts,
            options=SessionOptions(**{"on_failover": self.failovers.append, **options}),  # type: ignore[arg-type]
        )

    async def close(self) -> None:
        for node in (self.client, *self.strangers):
            await node.close()
        for server in self.servers:
            await server.registry.close()
            await server.node.close()
            await server.engine.close()


@asynccontextmanager
async def swarm_of(
    *blocks: str, seed: int = 0, delay: float = 0.0, router: Router | None = None, cache: int = CACHE
) -> AsyncIterator[Swarm]:
    swarm = Swarm(seed, Faults(delay=delay), router)
    await swarm.client.start()
    try:
        for each in blocks:
            await swarm.add(each, cache=cache)
        yield swarm
    finally:
        await swarm.close()


async def _pong(request: Ping, caller: Caller) -> Pong:
    return Pong(request.payload)


class Reference:
    """What the whole model makes of the same steps, in one process and without any network."""

    def __init__(self, sequences: int = 1, adapter: AdapterWeights | None = None) -> None:
        self.adapter = adapter
        self.rows: list[Rows] = [[] for _ in range(sequences)]

    async def step(
        self,
        rows: Sequence[Rows],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: str = "last",
    ) -> Rows:
        if sources:
            self.rows = [list(self.rows[source]) for source in sources]
        outputs: Rows = []
        for sequence, new in enumerate(rows):
            if starts is not None:
                del self.rows[sequence][starts[sequence] :]
            if not new:
                continue
            self.rows[sequence] += new
            executor = CountingExecutor()
            executor.reserve(SequenceId(0), 4096)
            segment = Segment(SequenceId(0), 0, len(self.rows[sequence]))
            adapter = None
            if self.adapter is not None:
                tensors = [tensor for each in self.adapter.tensors.values() for tensor in each]
                adapter = await executor.load_adapter(tensors, self.adapter.scaling)
            hidden = hidden_states(self.rows[sequence])
            part = ScheduledChunk(hidden, 0, executor.span, (segment,), adapter=adapter)
            (result,) = await executor.step([part])
            assert not isinstance(result, Exception)
            outputs += read_rows(result)[-1 if reply == "last" else -len(new) :]
        return outputs


@attrs.define(eq=False)
class Run:
    """A session and its reference, stepped together; every step asserts that they agree."""

    session: InferenceSession
    reference: Reference
    random: random.Random

    @classmethod
    def of(cls, session: InferenceSession, seed: int = 0, adapter: AdapterWeights | None = None) -> Run:
        return cls(session, Reference(session.sequences, adapter), random.Random(seed))

    def new_rows(self, count: int) -> Rows:
        # Values that survive float32 unchanged.
        return [[self.random.randrange(1 << 12) / (1 << 12) for _ in range(4)] for _ in range(count)]

    async def step(
        self,
        *lengths: int,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: str = "last",
    ) -> None:
        rows = [self.new_rows(length) for length in lengths]
        flat = [row for new in rows for row in new]
        output = await self.session.step(
            hidden_states(flat),
            lengths,
            starts=starts,
            sources=sources,
            reply=reply,  # type: ignore[arg-type]
        )
        expected = await self.reference.step(rows, starts=starts, sources=sources, reply=reply)
        assert read_rows(output) == expected


async def befall(swarm: Swarm, session: InferenceSession, kind: str, stage: int) -> None:
    """Have something happen to the server of a stage: ``"kill"``, ``"restart"`` or ``"break"``."""
    if stage >= len(session.chain):
        return
    peer = session.chain.peers[stage]
    server = next((s for s in swarm.servers if s.peer == peer and not s.dead), None)
    if server is None:
        return
    match kind:
        case "kill":
            await server.kill()
            await swarm.add(str(server.executor.span), cache=server.engine.cache_tokens)
        case "restart":  # comes back with the same identity and no caches
            await server.kill()
            await swarm.add(
                str(server.executor.span), identity=server.node.identity, cache=server.engine.cache_tokens
            )
        case "break":  # the connections only; the server lives on
            server.transport.break_connections()


async def quiet(swarm: Swarm) -> None:
    """Wait until every server has noticed that sessions are gone."""
    while any(any(server.counts()) for server in swarm.servers if not server.dead):
        await asyncio.sleep(0.01)

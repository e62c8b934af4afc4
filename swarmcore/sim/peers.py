"""Servers, clients and bootstrap peers in a simulated swarm: the real ones, on simulated machines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Literal

import attrs

from swarmcore.client.opening import Planner
from swarmcore.client.planner import SwarmPlanner
from swarmcore.client.session import InferenceSession, SessionOptions, open_session
from swarmcore.client.swarm import Swarm
from swarmcore.errors import SwarmError
from swarmcore.registry.base import Registry
from swarmcore.registry.gossip import GossipRegistry
from swarmcore.registry.options import GossipOptions
from swarmcore.registry.watch import WatchingRegistry
from swarmcore.routing.chain import FewestServers
from swarmcore.rpc import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.sim.executor import SimExecutor
from swarmcore.sim.transport import SimTransport
from swarmcore.sim.world import World
from swarmcore.types import Address, ServerInfo, Span

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class GossipSettings:
    """How the registries of a simulated swarm talk."""

    interval: float = 5.0
    """Seconds between two comparisons of a member with another one."""
    ttl: float = 30.0
    """Seconds for which an announcement is believed."""
    beat: float = 0.0
    """Seconds between signs of life of neighbours; 0 leaves a host that hangs to the transport's keep-alive."""

    @property
    def options(self) -> GossipOptions:
        return GossipOptions(interval=self.interval, beat=self.beat)


class Peer:
    """A machine, an identity, and the process that runs there, if one does."""

    def __init__(
        self, world: World, name: str, gossip: GossipSettings, *, megabits: float | None = None
    ) -> None:
        self.world = world
        self.name = name
        self.identity = world.identity(name)
        self.host = world.network.add_host(megabits=megabits)
        self.gossip = gossip
        self.node: Node | None = None
        self._starts = 0
        self._transport: SimTransport | None = None
        self._registry: Registry | None = None
        self._remains: dict[asyncio.Task[None], None] = {}
        world.settle(self)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(SimTransport.scheme, f"//{self.host.index}", self.identity.peer)

    @property
    def running(self) -> bool:
        """Whether its process has been started and has not ended."""
        return self.node is not None

    async def join(self, bootstrap: Sequence[Address]) -> tuple[Node, GossipRegistry]:
        """Start listening, and be a member of the swarm."""
        self._starts += 1
        transport = self._transport = self.world.network.transport(self.identity, self.host)
        node = self.node = Node(self.identity, [transport])
        registry = self._registry = GossipRegistry(
            node,
            bootstrap,
            options=self.gossip.options,
            rng=self.world.rng(f"{self.name}/registry/{self._starts}"),
            wall_clock=self.world.wall_clock,
        )
        await node.start()
        await registry.start()
        return node, registry

    def crash(self) -> None:
        """Kill the process."""
        self.world.note(f"{self.name} is killed")
        if self._transport is not None:
            self._transport.crash()
        self._forget()

    def cut_power(self) -> None:
        """Kill the process and switch off its machine, so that nobody is told."""
        self.world.note(f"the power of {self.name} is cut")
        self.world.network.cut_power(self.host)
        self._forget()

    def _forget(self) -> None:
        """Let go of a dead process: nothing it still does is heard outside."""
        task = asyncio.create_task(self._bury(self.node, self._registry), name=f"remains of {self.name}")
        self._remains[task] = None
        task.add_done_callback(self._remains.pop)
        self.node = self._transport = self._registry = None

    async def fall_silent(self) -> None:
        if self._registry is not None:
            await self._registry.close()

    async def end(self) -> None:
        if self.running:
            self.crash()
        if self._remains:
            await asyncio.wait(list(self._remains))

    async def _bury(self, node: Node | None, registry: Registry | None) -> None:
        if registry is not None:
            await registry.close()
        if node is not None:
            await node.close()


class SimBootstrap(Peer):
    """A member without blocks, for others to join through."""

    async def start(self) -> None:
        node, registry = await self.join([])
        info = ServerInfo(peer=node.peer, addresses=tuple(map(str, node.addresses)))
        await registry.announce(info, self.gossip.ttl)


class SimServer(Peer):
    """A block server that can be killed, and started again with nothing in its caches."""

    def __init__(
        self,
        world: World,
        name: str,
        gossip: GossipSettings,
        span: Span,
        *,
        cache_tokens: int = 65_536,
        speed: float = 1.0,
        megabits: float | None = None,
    ) -> None:
        super().__init__(world, name, gossip, megabits=megabits)
        self.span = span
        self.cache_tokens = cache_tokens
        self.speed = speed
        self.server: BlockServer | None = None

    async def start(self, bootstrap: Sequence[Address]) -> None:
        """Join through ``bootstrap`` and serve."""
        node, registry = await self.join(bootstrap)
        executor = SimExecutor(self.world.model, self.span, self.world.measured, speed=self.speed)
        config = ServerConfig(
            model=self.world.model.name, span=self.span, announce_ttl=self.gossip.ttl, idle_timeout=3600.0
        )
        self.server = BlockServer(config, node, registry, executor, cache_tokens=self.cache_tokens)
        await self.server.start()
        self.world.note(f"{self.name} serves {self.span}")

    @property
    def online(self) -> bool:
        """Whether it runs and takes sessions."""
        return self.running and self.server is not None and self.server.state == "online"

    async def _bury(self, node: Node | None, registry: Registry | None) -> None:
        server, self.server = self.server, None
        await super()._bury(node, registry)
        if server is not None:
            await server.close()

    def __repr__(self) -> str:
        return f"<SimServer {self.name} {self.span} {'up' if self.running else 'down'}>"


class SimClient:
    """Someone who generates text."""

    def __init__(
        self,
        world: World,
        name: str,
        gossip: GossipSettings,
        bootstrap: Sequence[Address],
        *,
        megabits: float | None = None,
    ) -> None:
        self.world = world
        self.name = name
        identity = world.identity(name)
        self.host = world.network.add_host(megabits=megabits)
        node = Node(identity, [world.network.transport(identity, self.host, listen=False)])
        registry = WatchingRegistry(
            node,
            bootstrap,
            options=gossip.options,
            rng=world.rng(f"{name}/registry"),
            wall_clock=world.wall_clock,
        )
        self.swarm = Swarm(node, registry, router=FewestServers(world.rng(f"{name}/routing")))
        self._ids = world.rng(f"{name}/sessions")
        world.settle(self)

    async def start(self) -> None:
        """Begin to watch the swarm."""
        await self.swarm.__aenter__()

    async def fall_silent(self) -> None:
        await self.swarm.registry.close()

    async def end(self) -> None:
        await self.swarm.close()

    async def open_session(self, *, max_tokens: int, options: SessionOptions) -> InferenceSession:
        """As `Swarm.open_session`, with session ids that follow from the seed."""
        swarm = self.swarm
        planner: Planner = SwarmPlanner(
            swarm.registry, swarm.router, swarm.health, self.world.model.info, session_id=self._session_id
        )
        return await open_session(
            swarm.node, planner, self.world.model.info, sequences=1, tokens=max_tokens, options=options
        )

    def _session_id(self) -> str:
        return f"{self._ids.getrandbits(128):032x}"

    def __repr__(self) -> str:
        return f"<SimClient {self.name}>"

"""Servers, clients and bootstrap peers in a simulated swarm: the real ones, on simulated machines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence

import attrs

from swarmcore.client.pinging import PingLimits
from swarmcore.client.session.session import InferenceSession, SessionOptions
from swarmcore.client.swarm import Swarm
from swarmcore.placement.choice import join_span
from swarmcore.registry.base import Registry, SwarmView
from swarmcore.registry.gossip.options import GossipOptions
from swarmcore.registry.gossip.records import RecordIssuer, RecordLimits, SignedRecord, decode_announcement
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.rpc import Node
from swarmcore.server.block_server import BlockServer
from swarmcore.server.config import ServerConfig
from swarmcore.server.throughput import ServerSpeed
from swarmcore.sim.executor import SimExecutor
from swarmcore.sim.network import SimTransport
from swarmcore.sim.world import World
from swarmcore.types import Address, PeerId, ServerInfo, Span

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class GossipSettings:
    """How the registries of a simulated swarm talk."""

    interval: float = 5.0
    """Seconds between two comparisons of a member with another one."""
    ttl: float = 30.0
    """Seconds for which an announcement is believed."""
    beat: float = 0.0
    """Seconds between signs of life of neighbours; 0 leaves hosts that hang to the transport's keep-alive."""

    @property
    def options(self) -> GossipOptions:
        limits = RecordLimits(max_ttl=max(self.ttl, RecordLimits().max_ttl))
        return GossipOptions(interval=self.interval, heartbeat_interval=self.beat, limits=limits)


@attrs.frozen(kw_only=True)
class ServerSettings:
    """How the servers of a simulated swarm are set up."""

    cache_tokens: int = 65_536
    rebalance: float = 0.0
    """Seconds between looks whether to move, on average; 0 for never."""
    balance_quality: float = 0.75
    drain: float = 30.0
    measures_neighbours: bool = True
    """Whether they measure round trips to servers that may follow them."""


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
        self._closing: dict[asyncio.Task[None], None] = {}
        world.add_participant(self)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(SimTransport.scheme, f"//{self.host.index}", self.identity.peer)

    @property
    def running(self) -> bool:
        """Whether its process has been started and has not ended."""
        return self.node is not None

    async def listen(self, bootstrap: Sequence[Address]) -> tuple[Node, GossipRegistry]:
        """Start the process, which will join the swarm through ``bootstrap``."""
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
        return node, registry

    def view(self) -> SwarmView | None:
        """What its registry shows; None while its process does not run."""
        return None if self._registry is None else self._registry.view()

    def record_of(self, info: ServerInfo) -> SignedRecord:
        """What this peer announces when it announces ``info`` now, for the first time."""
        issuer = RecordIssuer(self.identity, self.world.wall_clock, self.gossip.options.limits)
        return issuer.announce(info, self.gossip.ttl)

    def crash(self) -> None:
        """Kill the process."""
        self.world.note(f"{self.name} is killed")
        if self._transport is not None:
            self._transport.kill()
        self._detach()

    def cut_power(self) -> None:
        """Kill the process and switch off its machine, so that nobody is told."""
        self.world.note(f"the power of {self.name} is cut")
        self.world.network.cut_power(self.host)
        self._detach()

    def _detach(self) -> None:
        """Let go of a dead process: nothing it still does is heard outside."""
        task = asyncio.create_task(self._close_process(self.node, self._registry), name=f"close {self.name}")
        self._closing[task] = None
        task.add_done_callback(self._closing.pop)
        self.node = self._transport = self._registry = None

    async def stop_registry(self) -> None:
        if self._registry is not None:
            await self._registry.close()

    async def end(self) -> None:
        if self.running:
            self.crash()
        if self._closing:
            await asyncio.wait(list(self._closing))

    async def _close_process(self, node: Node | None, registry: Registry | None) -> None:
        if registry is not None:
            await registry.close()
        if node is not None:
            await node.close()


class SimBootstrap(Peer):
    """A member without blocks, for others to join through."""

    async def start(self, bootstrap: Sequence[Address] = (), known: Iterable[SignedRecord] = ()) -> None:
        """Join through ``bootstrap``; with ``known`` records, as `GossipRegistry.start` takes them."""
        node, registry = await self.listen(bootstrap)
        await registry.start(others(known, node.peer))
        await registry.announce(self.info, self.gossip.ttl)

    @property
    def info(self) -> ServerInfo:
        """What it announces."""
        return ServerInfo(peer=self.identity.peer, addresses=(str(self.address),))


class SimServer(Peer):
    """A block server that can be killed, and started again with nothing in its caches.

    ``hosts`` are the blocks that it holds, or how many: it then takes those that the swarm serves worst.
    """

    def __init__(
        self,
        world: World,
        name: str,
        gossip: GossipSettings,
        hosts: Span | int,
        *,
        settings: ServerSettings | None = None,
        speed: float = 1.0,
        megabits: float | None = None,
    ) -> None:
        super().__init__(world, name, gossip, megabits=megabits)
        self.hosts = hosts
        self.settings = settings or ServerSettings()
        self.speed = speed
        self.server: BlockServer | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it holds."""
        return len(self.hosts) if isinstance(self.hosts, Span) else self.hosts

    @property
    def throughput(self) -> float:
        """Tokens per second that it carries through its blocks."""
        # Whole numbers add up exactly, in any order.
        return float(round(self.world.measured.throughput(self.blocks) * self.speed))

    @property
    def span(self) -> Span | None:
        """The blocks that it serves now, if it does."""
        return self.server.span if self.server is not None and self.online else None

    async def start(self, bootstrap: Sequence[Address]) -> None:
        """Join through ``bootstrap``, load blocks, and serve."""
        node, registry = await self.listen(bootstrap)
        await registry.start()
        span = self.hosts if isinstance(self.hosts, Span) else await self._choose(node, registry, self.hosts)
        if self.node is node:  # it may have been killed while it loaded
            self.server = self._make(node, registry, span)
            await self.server.start()
            self.world.note(f"{self.name} serves {span}")

    async def prepare(self, bootstrap: Sequence[Address], span: Span) -> SignedRecord:
        """Be about to serve ``span``, loaded already, in a swarm that `resume` brings to life.

        Return what this server will announce; it holds when `resume` is called before any time has passed.
        """
        node, registry = await self.listen(bootstrap)
        self.server = self._make(node, registry, span)
        return self.record_of(attrs.evolve(self.server.info, state="online"))

    async def resume(self, known: Iterable[SignedRecord]) -> None:
        """Serve, in a swarm that has been together for a while: everybody has all ``known`` records."""
        assert isinstance(self._registry, GossipRegistry)
        assert self.server is not None
        await self._registry.start(others(known, self.identity.peer))
        await self.server.start()

    async def leave(self) -> None:
        """End the process in good order."""
        node, registry, server = self.node, self._registry, self.server
        self.world.note(f"{self.name} leaves")
        if server is not None:
            await server.leave()
            await server.close()
        self.node = self._transport = self._registry = self.server = None
        if registry is not None:
            await registry.close()
        if node is not None:
            await node.close()

    async def _choose(self, node: Node, registry: GossipRegistry, blocks: int) -> Span:
        """Take the blocks that the swarm serves worst, say so, and load them."""
        model = self.world.model.info
        rng = self.world.rng(f"{self.name}/choice/{self._starts}")
        span = join_span(registry.view(), model, blocks, rng, peer=node.peer)
        joining = ServerInfo(
            peer=node.peer,
            addresses=tuple(map(str, node.addresses)),
            state="joining",
            model=model,
            span=span,
            throughput=self.throughput,
            incarnation=self._starts,
        )
        await registry.announce(joining, self.gossip.ttl)
        await asyncio.sleep(len(span) * self.world.measured.load_seconds / self.speed)
        return span

    def _make(self, node: Node, registry: GossipRegistry, span: Span) -> BlockServer:
        settings = self.settings
        config = ServerConfig(
            model=self.world.model.name,
            span=span,
            announce_ttl=self.gossip.ttl,
            idle_timeout=3600.0,
            rebalance=settings.rebalance,
            balance_quality=settings.balance_quality,
            drain=settings.drain,
        )
        active = settings.measures_neighbours or settings.rebalance > 0
        return BlockServer(
            config,
            node,
            registry,
            SimExecutor(self.world.model, span, self.world.measured, speed=self.speed),
            cache_tokens=settings.cache_tokens,
            speed=ServerSpeed(stated=self.throughput),
            seconds_per_block=self.world.measured.load_seconds / self.speed,
            rng=self.world.rng(f"{self.name}/server/{self._starts}") if active else None,
            incarnation=self._starts,
        )

    @property
    def online(self) -> bool:
        """Whether it runs and takes sessions."""
        return self.running and self.server is not None and self.server.state == "online"

    async def _close_process(self, node: Node | None, registry: Registry | None) -> None:
        server, self.server = self.server, None
        await super()._close_process(node, registry)
        if server is not None:
            await server.close()

    def __repr__(self) -> str:
        return f"<SimServer {self.name} {self.span or self.hosts} {'up' if self.running else 'down'}>"


class SimClient:
    """Someone who generates text."""

    def __init__(
        self,
        world: World,
        name: str,
        gossip: GossipSettings,
        bootstrap: Sequence[Address],
        *,
        pings: PingLimits | None = None,
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
        ids = world.rng(f"{name}/sessions")
        self.swarm = Swarm(
            node,
            registry,
            pings=pings,
            rng=world.rng(f"{name}/swarm"),
            session_id=lambda: f"{ids.getrandbits(128):032x}",
        )
        world.add_participant(self)

    async def start(self) -> None:
        """Begin to watch the swarm."""
        await self.swarm.__aenter__()

    async def stop_registry(self) -> None:
        await self.swarm.registry.close()

    async def end(self) -> None:
        await self.swarm.close()

    def view(self) -> SwarmView:
        """What its registry shows."""
        return self.swarm.view()

    async def open_session(self, *, max_tokens: int, options: SessionOptions) -> InferenceSession:
        """As `Swarm.open_session`, for one sequence of the world's model."""
        return await self.swarm.open_session(self.world.model.info, max_tokens=max_tokens, options=options)

    def __repr__(self) -> str:
        return f"<SimClient {self.name}>"


def others(known: Iterable[SignedRecord], own: PeerId) -> Iterator[SignedRecord]:
    """The records of everybody but ``own``."""
    return (record for record in known if decode_announcement(record).peer != own)

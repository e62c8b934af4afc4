"""A large swarm through an hour: many clients, servers that come and go, and a third of them dead at once."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import attrs
from rich.table import Table

from swarmcore.client.pinging import PingLimits
from swarmcore.client.session.session import SessionOptions
from swarmcore.errors import InputError, SwarmError
from swarmcore.routing.coverage import missing_ranges
from swarmcore.sim.costs import load_costs
from swarmcore.sim.generation import Generation
from swarmcore.sim.hosts import Host
from swarmcore.sim.peers import GossipSettings, ServerSettings, SimBootstrap, SimClient, SimServer
from swarmcore.sim.scenario import Report, Scenario
from swarmcore.sim.world import World
from swarmcore.types import PeerId, Progress, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POLL = 0.1
"""Seconds between looks whether views still show the dead,"""
_POLL_OFTEN = 20.0
"""in so many seconds after their death;"""
_POLL_RARELY = 2.0
"""and after that."""


@attrs.frozen(kw_only=True)
class Load(Scenario):
    """Whether sessions live through it all, how long they take to recover, and what the registry costs."""

    kind: ClassVar[str] = "load"
    unit: ClassVar[str] = "s"

    servers: int = 1000
    clients: int = 200
    bootstraps: int = 4
    blocks: tuple[int, int] = (4, 10)
    """Least and most blocks that a server holds, drawn for each."""
    seconds: int = 3600
    gossip: GossipSettings = attrs.field(factory=partial(GossipSettings, interval=60.0, ttl=14_400.0))
    requests: float = 1.0
    """Generations that a client asks for in the whole time, on average."""
    prompt: int = 8
    tokens: int = 24
    restarts: int = 10
    """Servers that are killed one by one, at random moments, and come back after a while."""
    restart_seconds: float = 120.0
    mass_failure_at: float = 0.5
    """When many servers die at once, as a part of the whole time."""
    mass_failure: float = 1 / 3
    """The part of the servers that dies then."""
    rush: float = 0.3
    """The part of the clients that is in the middle of a generation when that happens."""

    def __attrs_post_init__(self) -> None:
        if min(self.servers, self.clients, self.bootstraps, self.seconds, self.prompt, self.tokens) < 1:
            raise InputError("servers, clients, bootstraps, seconds, prompt and tokens have to be 1 or more")
        if not 1 <= self.blocks[0] <= self.blocks[1]:
            raise InputError("blocks are the least and the most blocks of a server, 1 or more")
        if not (0 <= self.mass_failure_at <= 1 and 0 <= self.mass_failure < 1 and 0 <= self.rush <= 1):
            raise InputError("mass_failure_at and rush are parts of a whole; mass_failure is a part below 1")

    def simulate(self, seed: int, progress: Progress) -> Report:
        world = World(seed, self.network, load_costs(self.costs))
        run = _LoadRun(self, world, progress)
        world.run(run.run)
        report = Report(trace=world.trace.hash, messages=world.trace.messages, problems=world.problems)
        _fill_in(report, self, run)
        return report


@attrs.frozen(kw_only=True)
class Recovery:
    """A token that came late because servers were lost."""

    at: float
    seconds: float
    """From the token before it."""


@attrs.define
class Cleaning:
    """How long after the mass failure the dead were gone from the views, in seconds; one figure a view."""

    servers: list[float] = attrs.field(factory=list)
    clients: list[float] = attrs.field(factory=list)
    never: int = 0
    """Views that showed one to the end."""


class _LoadRun:
    def __init__(self, load: Load, world: World, progress: Progress) -> None:
        self.load = load
        self.world = world
        self.recoveries: list[Recovery] = []
        self.failovers: list[float] = []
        """Seconds from when a failure was noticed until the caches were there again."""
        self.steps: list[float] = []
        """Seconds of each step in which nothing failed."""
        self.finished = 0
        self.killed = 0
        self.cleaning = Cleaning()
        self._progress = progress
        self._rng = world.rng("crowd")
        self._bootstraps = [
            SimBootstrap(world, f"bootstrap {index}", load.gossip) for index in range(load.bootstraps)
        ]
        self._entry_addresses = [bootstrap.address for bootstrap in self._bootstraps]
        self.servers: list[SimServer] = []
        self.clients: list[SimClient] = []
        self._began = 0.0

    async def run(self) -> None:
        await self._assemble()
        self._began = self.world.now()
        self.world.freeze_garbage()
        load, rng = self.load, self._rng
        failure_at = load.mass_failure_at * load.seconds
        for client in self.clients:
            moments = [rng.uniform(0, load.seconds) for _ in range(_rounded(load.requests, rng))]
            if rng.random() < load.rush:
                moments.append(max(0.0, failure_at - rng.uniform(1.0, 5.0)))
            self.world.start(self._use(client, sorted(moments)), f"{client.name} generates")
        for _ in range(load.restarts):
            self.world.start(self._restart(rng.uniform(0, load.seconds)), "a server restarts")
        self.world.start(self._fail_many(failure_at), "the mass failure")
        for second in range(0, load.seconds, max(1, load.seconds // 100)):
            await self._until(second)
            self._progress(f"{self.finished} generations", second, load.seconds)
        await self._until(load.seconds)
        self._progress("done", load.seconds, load.seconds)
        await self.world.stop_tasks()

    async def _assemble(self) -> None:
        """A swarm that has been together for a while: everybody knows everybody, and no time has passed."""
        load, world, rng = self.load, self.world, self._rng
        known = [bootstrap.record_of(bootstrap.info) for bootstrap in self._bootstraps]
        settings = ServerSettings(measures_neighbours=False)
        blocks = world.model.blocks
        for index in range(load.servers):
            size = min(rng.randint(*load.blocks), blocks)
            # As the join rule would have it in the end: every block is held by about as many.
            start = min(max(0, rng.randint(1 - size, blocks - 1)), blocks - size)
            server = SimServer(
                world, f"server {index}", load.gossip, Span(start, start + size), settings=settings
            )
            known.append(await server.prepare(self._entry_addresses, Span(start, start + size)))
            self.servers.append(server)
        for bootstrap in self._bootstraps:
            await bootstrap.start(self._entry_addresses, known)
        for done, server in enumerate(self.servers):
            await server.resume(known)
            if done % 50 == 0:
                self._progress(f"{done} servers", 0, load.seconds)
        for index in range(load.clients):
            entry = self._entry_addresses[index % len(self._entry_addresses)]
            pings = PingLimits(servers=24, for_each_block=3)
            self.clients.append(SimClient(world, f"client {index}", load.gossip, [entry], pings=pings))
        await asyncio.gather(*(client.start() for client in self.clients))

    async def _until(self, moment: float) -> None:
        """Wait until ``moment`` seconds after the start."""
        await asyncio.sleep(self._began + moment - self.world.now())

    # --- clients --------------------------------------------------------------------------------------

    async def _use(self, client: SimClient, moments: list[float]) -> None:
        for moment in moments:
            await self._until(moment)
            generation = Generation.begin(
                self.world.model, seed=self._rng.getrandbits(32), prompt=self.load.prompt
            )
            try:
                await self._generate(client, generation)
            except SwarmError as exc:
                if not self._missing():
                    self.world.problems.append(
                        f"{client.name} gave up at {self.world.now() - self._began:.1f} s, token "
                        f"{len(generation.tokens)}, while every block had a holder: "
                        f"{type(exc).__name__}: {exc}"
                    )
            else:
                self.finished += 1
                self.world.note(f"{client.name} has a text")

    async def _generate(self, client: SimClient, generation: Generation) -> None:
        whole = self.load.prompt + self.load.tokens
        options = SessionOptions(on_failover=lambda failover: self.failovers.append(failover.seconds))
        session = await client.open_session(max_tokens=whole, options=options)
        try:
            start = 0
            while len(generation.tokens) < whole:
                before, began = session.failovers, self.world.now()
                await generation.step(session, start, self.world.measured.client_seconds)
                now = self.world.now()
                if session.failovers > before:
                    self.recoveries.append(Recovery(at=began - self._began, seconds=now - began))
                elif start:
                    self.steps.append(now - began)
                start = len(generation.tokens) - 1
        finally:
            await session.close()

    # --- servers --------------------------------------------------------------------------------------

    async def _restart(self, moment: float) -> None:
        await self._until(moment)
        server = self._rng.choice(self.servers)
        if not self._can_spare(server):
            return
        server.crash()
        self.killed += 1
        await asyncio.sleep(self.load.restart_seconds)
        try:
            await server.start(self._entry_addresses)
        except SwarmError as exc:
            self.world.problems.append(f"{server.name} could not come back: {exc}")

    async def _fail_many(self, moment: float) -> None:
        await self._until(moment)
        victims = self._rng.sample(self.servers, round(self.load.mass_failure * len(self.servers)))
        failing = [server for server in victims if self._can_spare(server)]
        for server in failing:
            server.crash()
        self.killed += len(failing)
        await self._watch_views({server.identity.peer for server in failing})

    async def _watch_views(self, dead: set[PeerId]) -> None:
        """See when each view is rid of the ``dead``."""
        began, now = self.world.now(), self.world.now
        members = [(server, self.cleaning.servers) for server in self.servers if server.running]
        unclean: list[tuple[SimServer | SimClient, list[float]]] = [
            *members,
            *((client, self.cleaning.clients) for client in self.clients),
        ]
        while unclean:
            self.cleaning.never = len(unclean)
            await asyncio.sleep(_POLL if now() < began + _POLL_OFTEN else _POLL_RARELY)
            left = []
            for peer, times in unclean:
                view = peer.view()
                if view is None:
                    continue  # killed meanwhile
                if dead.isdisjoint(view.servers):
                    times.append(now() - began)
                else:
                    left.append((peer, times))
            unclean = left
        self.cleaning.never = 0

    def _can_spare(self, server: SimServer) -> bool:
        """Whether ``server`` runs and every block would have a holder without it."""
        return server.running and not self._missing(without=server)

    def _missing(self, *, without: SimServer | None = None) -> list[Span]:
        spans = [s.span for s in self.servers if s is not without]
        return missing_ranges([span for span in spans if span], Span(0, self.world.model.blocks))


def _rounded(mean: float, rng: random.Random) -> int:
    """A whole number, ``mean`` on average."""
    return int(mean) + (rng.random() < mean % 1)


SOON = 5.0
"""Seconds after which no view should show those that died together."""

_QUANTILES = (0.5, 0.9, 0.99)


def _fill_in(report: Report, load: Load, run: _LoadRun) -> None:
    """Fill in what was measured."""
    recoveries = sorted(recovery.seconds for recovery in run.recoveries)
    servers = [_registry_bytes(server.host) / load.seconds for server in run.servers]
    clients = [_registry_bytes(client.host) / load.seconds for client in run.clients]
    report.goals["no session gave up while every block had a holder"] = not report.problems
    if run.cleaning.servers or run.cleaning.never:
        seen_last = max((*run.cleaning.servers, *run.cleaning.clients), default=0.0)
        report.goals[f"the dead were gone from every view within {SOON:g} s"] = (
            not run.cleaning.never and seen_last <= SOON
        )
    report.data.update(
        finished=run.finished,
        killed=run.killed,
        recoveries=[attrs.asdict(recovery) for recovery in run.recoveries],
        failovers=run.failovers,
        usual_step=statistics.median(run.steps) if run.steps else None,
        clean_after={"servers": sorted(run.cleaning.servers), "clients": sorted(run.cleaning.clients)},
        never_clean=run.cleaning.never,
        registry_bytes_per_second={
            "server": {"mean": statistics.fmean(servers), "most": max(servers)},
            "client": {"mean": statistics.fmean(clients), "most": max(clients)},
        },
    )
    table = Table(
        title=f"{load.servers} servers, {load.clients} clients, {load.seconds} s",
        title_justify="left",
        show_header=False,
    )
    table.add_row("generations that came to their end", str(run.finished))
    table.add_row("servers killed", str(run.killed))
    for whose, times in (("servers", run.cleaning.servers), ("clients", run.cleaning.clients)):
        table.add_row(f"views of {whose} rid of the dead after", _spread(sorted(times)))
    table.add_row("views that never were", str(run.cleaning.never))
    table.add_row("step without a failure, median", _seconds(report.data["usual_step"]))
    table.add_row("steps in which servers were lost", str(len(recoveries)))
    for quantile in _QUANTILES:
        table.add_row(
            f"  seconds such a step took, {quantile:.0%}", _seconds(_quantile(recoveries, quantile))
        )
    table.add_row("  the longest", _seconds(recoveries[-1] if recoveries else None))
    table.add_row("registry traffic of a server, in and out", _traffic(servers))
    table.add_row("registry traffic of a client", _traffic(clients))
    report.tables.append(table)
    report.plot = partial(_plot, recoveries, report.data["usual_step"])


def _registry_bytes(host: Host) -> int:
    """Bytes that a host has sent and received for its registry."""
    return sum(
        size
        for counter in (host.sent, host.received)
        for method, size in counter.items()
        if method.startswith(("/swarmcore/gossip/", "/swarmcore/registry/", "/swarmcore/alive/"))
    )


def _quantile(ordered: Sequence[float], part: float) -> float | None:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else None


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"


def _spread(ordered: Sequence[float]) -> str:
    if not ordered:
        return "none"
    return f"{_quantile(ordered, 0.5):.1f} s (half of them), {ordered[-1]:.1f} s (all)"


def _traffic(rates: Sequence[float]) -> str:
    return f"{statistics.fmean(rates):,.0f} B/s on average, {max(rates):,.0f} B/s at most"


def _plot(recoveries: Sequence[float], usual: float | None, figure: Figure) -> None:
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    if recoveries:
        parts = [(index + 1) / len(recoveries) for index in range(len(recoveries))]
        axes.step(recoveries, parts, where="post", label="steps in which servers were lost")
    if usual is not None:
        axes.axvline(usual, color="grey", linestyle="--", label="a step without a failure")
    axes.set_xscale("log")
    axes.set_xlabel("seconds from one token to the next")
    axes.set_ylabel("part of the steps")
    axes.set_ylim(0, 1.02)
    axes.legend()

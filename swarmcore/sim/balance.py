"""The paper's ablation of load balancing: none, for new servers only, or full; under churn."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs
from rich.table import Table

from swarmcore.errors import InputError, SwarmError
from swarmcore.placement.swarm_throughput import Placement
from swarmcore.sim.costs import load_costs
from swarmcore.sim.optimum import (
    MOST_ARRANGEMENTS,
    arrangements,
    best_throughput,
    good_arrangement,
    worst_block,
)
from swarmcore.sim.peers import GossipSettings, ServerSettings, SimBootstrap, SimServer
from swarmcore.sim.scenario import Report, Scenario, combined
from swarmcore.sim.world import World
from swarmcore.types import PeerId, Progress, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Balancing = Literal["none", "new", "full"]
"""Servers take any blocks; those that the swarm serves worst when they come; and move when it pays."""

ARMS: tuple[Balancing, ...] = ("none", "new", "full")


@attrs.frozen(kw_only=True)
class Balance(Scenario):
    """Throughput of the worst served block, as a part of what the same servers could give at best."""

    kind: ClassVar[str] = "balance"
    unit: ClassVar[str] = "s"

    servers: int = 40
    """How many there are, on average."""
    blocks: tuple[int, int] = (3, 10)
    """Least and most blocks that a server holds, drawn for each."""
    speeds: tuple[float, ...] = (0.5, 1.0, 1.0, 2.0, 4.0)
    """Of servers, against the measured one; drawn for each."""
    seconds: int = 2 * 3600
    lifetime: float = 3600.0
    """Seconds that a server stays, on average; another one comes in its place."""
    away: float = 60.0
    """Seconds until that, on average."""
    rebalance: float = 60.0
    """Seconds between two looks of a server whether to move, on average."""
    balance_quality: float = 0.75
    drain: float = 10.0
    sample: int = 60
    """Seconds between two looks at the throughput."""
    settled: float = 0.25
    """The part of the time after which the swarm counts as settled."""
    gossip: GossipSettings = attrs.field(factory=lambda: GossipSettings(interval=30.0, ttl=1800.0))

    def __attrs_post_init__(self) -> None:
        if min(self.servers, self.seconds, self.sample) < 1 or min(self.lifetime, self.away) <= 0:
            raise InputError("servers, seconds, sample, lifetime and away have to be above 0")
        if not 1 <= self.blocks[0] <= self.blocks[1]:
            raise InputError("blocks are the least and the most blocks of a server, 1 or more")
        if not self.speeds or min(self.speeds) <= 0:
            raise InputError("speeds has to list factors above 0")

    def simulate(self, seed: int, progress: Progress) -> Report:
        runs = []
        best: dict[frozenset[PeerId], float] = {}
        for done, balancing in enumerate(ARMS):
            run = _Run(self, seed, balancing, best)
            run.world.run(lambda run=run, done=done: run.run(progress, done * self.seconds))  # type: ignore[misc]
            runs.append(run.result())
        progress("done", len(ARMS) * self.seconds, len(ARMS) * self.seconds)
        report = Report(
            trace=combined([run.trace for run in runs]), messages=sum(run.messages for run in runs)
        )
        balance_report(self, runs, report)
        return report


@attrs.frozen(kw_only=True)
class Sample:
    """The swarm at one moment."""

    at: float
    servers: int
    throughput: float
    """Tokens per second through the worst served block."""
    best: float
    """The same in the best arrangement of the servers that run."""
    exact: bool
    """Whether that was found by trying all arrangements."""
    moves: int
    """Made so far."""

    @property
    def part(self) -> float:
        """Of what is possible."""
        return self.throughput / self.best if self.best else 1.0


@attrs.frozen(kw_only=True)
class BalanceResult:
    """What came of one way to balance."""

    balancing: Balancing
    samples: tuple[Sample, ...]
    joins: int
    trace: str
    messages: int
    problems: tuple[str, ...]


class _Run:
    def __init__(
        self, balance: Balance, seed: int, balancing: Balancing, best: dict[frozenset[PeerId], float]
    ) -> None:
        self.balance = balance
        self.balancing = balancing
        # All three meet the same servers, coming and going at the same times.
        self.world = World(seed, balance.network, load_costs(balance.costs))
        self._rng = self.world.rng("balance")
        self._bootstrap = SimBootstrap(self.world, "bootstrap", balance.gossip)
        self._running: list[SimServer] = []
        self._joins = 0
        self._moves: dict[str, int] = {}
        self._samples: list[Sample] = []
        self._best = best
        self._good: dict[PeerId, Span] = {}

    async def run(self, progress: Progress, done: int) -> None:
        balance = self.balance
        await self._bootstrap.start()
        for place in range(balance.servers):
            servers = self._occupy(place, self.world.rng(f"place {place}"))
            self.world.start(servers, f"place {place}")
        for second in range(balance.sample, balance.seconds + 1, balance.sample):
            await asyncio.sleep(second - self.world.now())
            self._take_sample()
            progress(f"balancing: {self.balancing}", done + second, len(ARMS) * balance.seconds)
        await self.world.stop_tasks()

    def result(self) -> BalanceResult:
        return BalanceResult(
            balancing=self.balancing,
            samples=tuple(self._samples),
            joins=self._joins,
            trace=self.world.trace.hash,
            messages=self.world.trace.messages,
            problems=tuple(self.world.problems),
        )

    async def _occupy(self, place: int, rng: random.Random) -> None:
        """One server after the other, each for a while."""
        balance, world = self.balance, self.world
        await asyncio.sleep(rng.uniform(0, 60))
        generation = 0
        while True:
            size = min(rng.randint(*balance.blocks), world.model.blocks)
            start = rng.randint(0, world.model.blocks - size)
            speed = rng.choice(balance.speeds)
            stays, away = rng.expovariate(1 / balance.lifetime), rng.expovariate(1 / balance.away)
            crashes = rng.random() < 0.5
            server = SimServer(
                world,
                f"server {place}.{generation}",
                balance.gossip,
                Span(start, start + size) if self.balancing == "none" else size,
                settings=ServerSettings(
                    rebalance=balance.rebalance if self.balancing == "full" else 0.0,
                    balance_quality=balance.balance_quality,
                    drain=balance.drain,
                    measures_neighbours=False,
                ),
                speed=speed,
            )
            generation += 1
            self._joins += 1
            self._running.append(server)
            try:
                await server.start([self._bootstrap.address])
                await asyncio.sleep(stays)
            except SwarmError as exc:
                world.problems.append(f"{server.name} could not join: {exc}")
            self._running.remove(server)
            if crashes:
                server.crash()
            else:
                await server.leave()
            await asyncio.sleep(away)

    def _take_sample(self) -> None:
        serving, able = [], []
        for server in self._running:
            if server.server is None or not server.running:
                continue
            size = server.blocks
            self._moves[server.name] = server.server.moves
            able.append(Placement(server.identity.peer, Span(0, size), server.throughput))
            if server.span is not None:
                serving.append(Placement(server.identity.peer, server.span, server.throughput))
        blocks = self.world.model.blocks
        self._samples.append(
            Sample(
                at=self.world.now(),
                servers=len(able),
                throughput=worst_block(serving, blocks),
                best=self._best_of(able, serving),
                exact=arrangements(able, blocks) <= MOST_ARRANGEMENTS,
                moves=sum(self._moves.values()),
            )
        )

    def _best_of(self, able: list[Placement], serving: list[Placement]) -> float:
        """What ``able`` could carry at best; found once for servers that meet in more than one run."""
        blocks = self.world.model.blocks
        who = frozenset(each.peer for each in able)
        if who not in self._best:
            rng = self.world.rng(f"best/{self.world.now()}")
            if arrangements(able, blocks) <= MOST_ARRANGEMENTS:
                self._best[who] = best_throughput(able, blocks, rng)
            else:
                # From the last good one: few servers have come or gone since.
                placed = [attrs.evolve(each, span=self._good.get(each.peer, each.span)) for each in able]
                good = good_arrangement(placed, blocks, rng)
                self._good = {each.peer: each.span for each in good}
                self._best[who] = worst_block(good, blocks)
        # A search may have missed what the swarm has found.
        self._best[who] = max(self._best[who], worst_block(serving, blocks))
        return self._best[who]


NAMES: dict[Balancing, str] = {"none": "no balancing", "new": "new servers only", "full": "full"}

GOAL = 0.95


def balance_report(balance: Balance, runs: Sequence[BalanceResult], report: Report) -> None:
    """Fill in what was measured."""
    report.problems += [f"{NAMES[run.balancing]}: {problem}" for run in runs for problem in run.problems]
    exact = all(sample.exact for run in runs for sample in run.samples)
    how = "all arrangements tried" if exact else "found by a search"
    table = Table(
        title=f"throughput against the best possible ({how}), {balance.servers} servers", title_justify="left"
    )
    for name in ("balancing", "mean", "lowest", "joins", "moves", "moves per server and hour"):
        table.add_column(name, justify="left" if name == "balancing" else "right")
    for run in runs:
        settled = [s for s in run.samples if s.at >= balance.settled * balance.seconds]
        # Means of throughputs, not of parts: an hour at half is half an hour lost.
        part = sum(s.throughput for s in settled) / max(sum(s.best for s in settled), 1e-9)
        lowest = min(s.part for s in settled)
        moves = run.samples[-1].moves
        hours = statistics.fmean(s.servers for s in run.samples) * balance.seconds / 3600
        report.data[run.balancing] = {
            "part": part,
            "lowest": lowest,
            "joins": run.joins,
            "moves": moves,
            "samples": [attrs.asdict(sample) for sample in run.samples],
        }
        table.add_row(
            NAMES[run.balancing],
            f"{part:.1%}",
            f"{lowest:.1%}",
            str(run.joins),
            str(moves),
            f"{moves / max(hours, 1e-9):.2f}",
        )
        if run.balancing == "full":
            report.goals["full balancing: 95 % of the best possible once settled"] = part >= GOAL
    report.data["exact"] = exact
    report.tables.append(table)
    report.plot = partial(_plot, balance, runs)


def _plot(balance: Balance, runs: Sequence[BalanceResult], figure: Figure) -> None:
    figure.set_size_inches(8, 4)
    axes = figure.add_subplot()
    for run in runs:
        hours = [sample.at / 3600 for sample in run.samples]
        axes.plot(hours, [100 * sample.part for sample in run.samples], label=NAMES[run.balancing])
    axes.axvline(balance.settled * balance.seconds / 3600, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("hours")
    axes.set_ylabel("% of the best possible")
    axes.set_ylim(0, 105)
    axes.legend()

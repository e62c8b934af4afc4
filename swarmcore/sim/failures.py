"""The paper's table of failure rates: this system beside caching with restarts and beside no caches at all.

Before each step every server of the chain fails with a given probability, at some moment within the step: its
process is killed, and comes back with empty caches after a while. The last holder of a block is spared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs
from rich.table import Table

from swarmcore.client.session.session import Failover, InferenceSession, SessionOptions
from swarmcore.errors import InputError, SwarmError
from swarmcore.sim.costs import load_costs
from swarmcore.sim.generation import Generation
from swarmcore.sim.peers import GossipSettings, SimBootstrap, SimClient, SimServer
from swarmcore.sim.scenario import Report, Scenario, combined
from swarmcore.sim.world import World
from swarmcore.types import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Algorithm = Literal["client", "servers", "restarts", "cacheless"]
"""This system, with either journal; a new start from the first token; the whole prefix again at each step."""

_RETRY = 0.05
"""Seconds until the baselines open another session after a failure."""


@attrs.frozen(kw_only=True)
class FailureTable(Scenario):
    """Steps per second of a generation, by algorithm, length and failure rate."""

    kind: ClassVar[str] = "failures"

    stages: int = 4
    replicas: int = 8
    """Servers that hold the same blocks."""
    tokens: tuple[int, ...] = (128, 1024)
    probabilities: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    """That a server of the chain fails during a step."""
    algorithms: tuple[Algorithm, ...] = ("client", "servers", "restarts", "cacheless")
    runs: int = 2
    """Generations for each cell."""
    repair_seconds: float = 20.0
    """From a server's failure until it starts again."""
    patience: int = 30
    """A generation is given up when it has taken this many times the steps that it needs without failures."""

    def __attrs_post_init__(self) -> None:
        if min(self.stages, self.replicas, self.runs, self.patience, *self.tokens) < 1:
            raise InputError("stages, replicas, runs, patience and tokens have to be 1 or more")
        if not all(0 <= probability < 1 for probability in self.probabilities):
            raise InputError("probabilities have to be from 0 to below 1")

    def simulate(self, seed: int, progress: Progress) -> Report:
        cells = []
        wanted = [(a, t, p) for t in self.tokens for a in self.algorithms for p in self.probabilities]
        for done, (algorithm, tokens, probability) in enumerate(wanted):
            progress(f"{algorithm}, {tokens} tokens, {probability:g}", done, len(wanted))
            cells.append(_Cell(self, seed, algorithm, tokens, probability).run())
        progress("done", len(wanted), len(wanted))
        report = Report(trace=combined([c.trace for c in cells]), messages=sum(c.messages for c in cells))
        failure_report(self, cells, report)
        return report


@attrs.frozen(kw_only=True)
class CellResult:
    """What was measured for one algorithm, length and probability."""

    algorithm: Algorithm
    tokens: int
    probability: float
    steps_per_second: float | None
    """None when no generation came to its end in time."""
    failures: int
    """Servers killed."""
    spared: int
    """Failures that did not happen, since they would have left blocks without a holder."""
    failovers: tuple[float, ...]
    """Seconds that each failover took."""
    problems: tuple[str, ...]
    trace: str
    messages: int


class _Cell:
    def __init__(
        self, table: FailureTable, seed: int, algorithm: Algorithm, tokens: int, probability: float
    ) -> None:
        self.table = table
        self.algorithm = algorithm
        self.tokens = tokens
        self.probability = probability
        # Every algorithm meets the same network; failures come as its own steps take them.
        self.world = World(f"{seed}/{tokens}/{probability:g}", table.network, load_costs(table.costs))
        self.failovers: list[Failover] = []
        self.steps = 0

    def run(self) -> CellResult:
        world = self.world
        seconds, finished, failures = world.run(self._run)
        return CellResult(
            algorithm=self.algorithm,
            tokens=self.tokens,
            probability=self.probability,
            steps_per_second=finished * self.tokens / seconds if finished else None,
            failures=failures.killed,
            spared=failures.spared,
            failovers=tuple(failover.seconds for failover in self.failovers),
            problems=tuple(world.problems),
            trace=world.trace.hash,
            messages=world.trace.messages,
        )

    async def _run(self) -> tuple[float, int, Failures]:
        world, table = self.world, self.table
        gossip = GossipSettings()
        bootstrap = SimBootstrap(world, "bootstrap", gossip)
        await bootstrap.start()
        servers = []
        for stage, span in enumerate(world.model.info.span.split(table.stages)):
            for replica in range(table.replicas):
                server = SimServer(world, f"server {stage}.{replica}", gossip, span)
                await server.start([bootstrap.address])
                servers.append(server)
        failures = Failures(world, servers, bootstrap, self.probability, table.repair_seconds)
        client = SimClient(world, "client", gossip, [bootstrap.address])
        await client.start()
        await client.swarm.wait_for_blocks(world.model.info, timeout=60)
        finished = 0
        began = world.now()
        for run in range(table.runs):
            generation = Generation.begin(world.model, seed=run)
            if not await self._generate(client, generation, failures):
                break
            finished += 1
            world.note(f"generation {run} ends")
        return world.now() - began, finished, failures

    async def _generate(self, client: SimClient, generation: Generation, failures: Failures) -> bool:
        """Whether the generation came to its end."""
        if self.algorithm in ("client", "servers"):
            try:
                await self._extend(client, generation, failures)
            except SwarmError as exc:
                self.world.problems.append(f"a session gave up at token {len(generation.tokens)}: {exc}")
                return False
            return True
        limit = self.steps + self.table.patience * self.tokens
        while self.steps < limit:
            try:
                await self._extend(client, generation, failures, limit)
            except SwarmError as exc:
                self.world.note(f"{type(exc).__name__} at token {len(generation.tokens)}")
                if self.algorithm == "restarts":
                    del generation.tokens[1:], generation.states[:]
                await asyncio.sleep(_RETRY)
            else:
                return self.steps < limit
        return False

    async def _extend(
        self, client: SimClient, generation: Generation, failures: Failures, limit: float = float("inf")
    ) -> None:
        """In one session, until the generation is at its end or the session breaks."""
        options = SessionOptions(
            journal=self.algorithm if self.algorithm in ("client", "servers") else "off",
            on_failover=self.failovers.append,
        )
        session = await client.open_session(max_tokens=self.tokens, options=options)
        took = 0.1
        try:
            while len(generation.tokens) <= self.tokens and self.steps < limit:
                failures.strike(session, took)
                began = self.world.now()
                start = 0 if self.algorithm == "cacheless" else len(generation.tokens) - 1
                self.steps += 1
                await generation.step(session, start, self.world.measured.client_seconds)
                took = self.world.now() - began
        finally:
            await session.close()


class Failures:
    """Kills servers of a chain at random, and starts them again after a while."""

    def __init__(
        self,
        world: World,
        servers: Sequence[SimServer],
        bootstrap: SimBootstrap,
        probability: float,
        repair_seconds: float,
    ) -> None:
        self.killed = 0
        self.spared = 0
        self._world = world
        self._servers = {server.identity.peer: server for server in servers}
        self._bootstrap = bootstrap
        self._probability = probability
        self._repair_seconds = repair_seconds
        self._rng: random.Random = world.rng("failures")

    def strike(self, session: InferenceSession, within: float) -> None:
        """Let each server of the session's chain fail with the given probability, within so many seconds."""
        loop = asyncio.get_running_loop()
        for peer in session.chain.peers:
            if self._rng.random() < self._probability:
                loop.call_later(self._rng.uniform(0, within), self._fail, self._servers[peer])

    def _fail(self, server: SimServer) -> None:
        if not server.running:
            return
        if not any(
            other is not server and other.span == server.span and other.online
            for other in self._servers.values()
        ):
            self.spared += 1
            return
        self.killed += 1
        server.crash()
        asyncio.get_running_loop().call_later(self._repair_seconds, self._start, server)

    def _start(self, server: SimServer) -> None:
        self._world.start(server.start([self._bootstrap.address]), f"start {server.name}")


NAMES: dict[Algorithm, str] = {
    "client": "this system",
    "servers": "this system, journal on servers",
    "restarts": "caching with restarts",
    "cacheless": "no caches",
}

PAPER: dict[tuple[Algorithm, int], dict[float, float | None]] = {
    ("client", 128): {0.0: 11.4, 1e-4: 11.4, 1e-3: 10.6, 1e-2: 3.38},
    ("restarts", 128): {0.0: 17.1, 1e-4: 16.7, 1e-3: 12.0, 1e-2: 0.18},
    ("cacheless", 128): {0.0: 3.44},
    ("client", 1024): {0.0: 10.7, 1e-4: 10.7, 1e-3: 7.76, 1e-2: 2.17},
    ("restarts", 1024): {0.0: 15.5, 1e-4: 11.8, 1e-3: 0.48, 1e-2: None},
    ("cacheless", 1024): {0.0: 0.89},
}
"""Steps per second of BLOOM-7.1B over four stages, arXiv 2312.08361; None: it never came to an end."""

CONFIRMED = {(1024, 1e-3), (1024, 1e-2)}
"""Lengths and probabilities whose figures were found in a second source."""

MOST_OVERHEAD = 0.05
LEAST_KEPT = 0.5


def failure_report(scenario: FailureTable, cells: Sequence[CellResult], report: Report) -> None:
    """Fill in what was measured."""
    found = {(cell.algorithm, cell.tokens, cell.probability): cell for cell in cells}
    report.data["cells"] = [attrs.asdict(cell) for cell in cells]
    report.problems += [
        f"{NAMES[cell.algorithm]}, {cell.tokens} tokens, {cell.probability:g}: {problem}"
        for cell in cells
        for problem in cell.problems
    ]
    report.tables += [_table(scenario, tokens, found) for tokens in scenario.tokens]
    report.tables += _ratios(scenario, found, report)
    report.plot = partial(_plot, scenario, found)


Found = dict[tuple[Algorithm, int, float], CellResult]


def _table(scenario: FailureTable, tokens: int, found: Found) -> Table:
    table = Table(title=f"steps per second, {tokens} tokens, {scenario.stages} stages", title_justify="left")
    table.add_column("failures per step and server")
    for probability in scenario.probabilities:
        table.add_column(f"{probability:g}", justify="right")
    for algorithm in scenario.algorithms:
        cells = [found[algorithm, tokens, probability] for probability in scenario.probabilities]
        table.add_row(NAMES[algorithm], *(_rate(cell.steps_per_second) for cell in cells))
        if paper := PAPER.get((algorithm, tokens)):
            table.add_row(
                "  the paper's (BLOOM-7.1B, 4 stages)",
                *(_paper(paper, tokens, probability) for probability in scenario.probabilities),
                style="dim",
            )
    return table


def _ratios(scenario: FailureTable, found: Found, report: Report) -> list[Table]:
    """What a journal costs without failures, and what failures leave of the speed."""
    table = Table(title="against no failures", title_justify="left")
    for name in ("", "tokens", "cost of the journal", "kept at the highest failure rate"):
        table.add_column(name, justify="left" if not name else "right")
    worst = max(scenario.probabilities)
    for algorithm in ("client", "servers"):
        for tokens in scenario.tokens:
            ours = found.get((algorithm, tokens, 0.0))
            if ours is None or not ours.steps_per_second:
                continue
            plain = found.get(("restarts", tokens, 0.0))
            failing = found[algorithm, tokens, worst].steps_per_second or 0.0
            kept = failing / ours.steps_per_second
            row = {"algorithm": algorithm, "tokens": tokens, "kept": kept}
            cost = ""
            if plain is not None and plain.steps_per_second:
                overhead = 1 - ours.steps_per_second / plain.steps_per_second
                row["overhead"] = overhead
                cost = f"{100 * overhead:.1f} %"
                report.goals[f"{NAMES[algorithm]}, {tokens} tokens: costs 5 % or less"] = (
                    overhead <= MOST_OVERHEAD
                )
            report.goals[f"{NAMES[algorithm]}, {tokens} tokens: keeps half at {worst:g}"] = kept >= LEAST_KEPT
            report.data.setdefault("ratios", []).append(row)
            table.add_row(NAMES[algorithm], str(tokens), cost, f"{100 * kept:.0f} %")
    return [table] if table.row_count else []


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.3g}"


def _paper(paper: dict[float, float | None], tokens: int, probability: float) -> str:
    if probability not in paper:
        return ""
    return _rate(paper[probability]) + ("" if (tokens, probability) in CONFIRMED else " unconfirmed")


def _plot(scenario: FailureTable, found: Found, figure: Figure) -> None:
    width = 0.8 / len(scenario.algorithms)
    figure.set_size_inches(5.5 * len(scenario.tokens), 4)
    for place, tokens in enumerate(scenario.tokens, 1):
        axes = figure.add_subplot(1, len(scenario.tokens), place)
        for index, algorithm in enumerate(scenario.algorithms):
            cells = [found[algorithm, tokens, probability] for probability in scenario.probabilities]
            at = [x + (index + 0.5) * width - 0.4 for x in range(len(cells))]
            axes.bar(at, [cell.steps_per_second or 0.0 for cell in cells], width, label=NAMES[algorithm])
            paper = PAPER.get((algorithm, tokens), {})
            points = [
                (x, rate)
                for x, probability in zip(at, scenario.probabilities, strict=True)
                if (rate := paper.get(probability)) is not None
            ]
            if points:
                label = "the paper's (BLOOM-7.1B)" if algorithm == "client" else None
                axes.plot(*zip(*points, strict=True), "kD", markersize=4, label=label)
        axes.set_xticks(range(len(scenario.probabilities)), [f"{p:g}" for p in scenario.probabilities])
        axes.set_xlabel("failures per step and server")
        axes.set_ylabel("steps per second")
        axes.set_title(f"{tokens} tokens")
        axes.legend(fontsize=8)

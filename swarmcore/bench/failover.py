"""How long a text stands still when a server of its chain is killed: real processes, kill -9."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import attrs
from rich.table import Table

from swarmcore.bench.swarms import start_fleet
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.model import RemoteModel
from swarmcore.client.session.options import Failover, SessionOptions
from swarmcore.client.swarm import Swarm, connect
from swarmcore.session.steps import JournalMode
from swarmcore.testing.fleet import Fleet
from swarmcore.types import Progress

PROMPT = "The history of the sea is the history of those who crossed it. Long before there were maps,"

KILL_SHARE = 0.3
"""Of the tokens before which a server is killed."""


@attrs.frozen
class Recovery:
    """One kill, and what it cost."""

    stage: int
    """Of the server that was killed, from 0."""
    token: int
    """How many tokens had been generated."""
    seconds: float
    """From the kill to the next token."""
    rebuilt_tokens: int
    """Tokens whose caches the replacement had to build."""


@attrs.frozen
class FailoverResult:
    """What was measured with one kind of journal."""

    journal: JournalMode
    recoveries: tuple[Recovery, ...]
    undisturbed_seconds: float
    """Between two tokens when nobody falls: the median."""

    def seconds(self, share: float) -> float:
        """The time within which this share of the sessions went on; 0 is the shortest, 1 the longest."""
        ordered = sorted(recovery.seconds for recovery in self.recoveries)
        return ordered[round(share * (len(ordered) - 1))]


@attrs.frozen(kw_only=True)
class FailoverBench:
    """What to measure. In every generation servers in use are killed at random, each as soon as the one
    before it has been replaced, and the swarm is told of it by nobody."""

    model: str
    dtype: str = "bfloat16"
    threads: int = 1
    stages: int = 3
    replicas: int = 2
    tokens: int = 64
    """Of one generation; the longer, the more is to be rebuilt."""
    kills: int = 30
    """For each kind of journal."""
    journals: tuple[JournalMode, ...] = ("client", "servers")
    seed: int = 0

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[FailoverResult]:
        """Start a swarm, measure, stop it. Takes a second or two for each kill."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark(f"starting {self.stages * self.replicas} servers")
        async with AsyncExitStack() as stack:
            started = start_fleet(
                checkpoint, self.stages, self.replicas, dtype=self.dtype, threads=self.threads
            )
            fleet = await stack.enter_async_context(started)
            swarm = await stack.enter_async_context(connect(*fleet.addresses))
            results = []
            for journal in self.journals:
                remark(f"{self.kills} kills, journal of the {journal}")
                measuring = _Measuring(self, fleet, swarm, random.Random(f"{self.seed} {journal}"))
                results.append(await measuring.run(checkpoint, journal))
            return results


class _Measuring:
    """Generations that are disturbed until there were kills enough."""

    def __init__(self, bench: FailoverBench, fleet: Fleet, swarm: Swarm, rng: random.Random) -> None:
        self._bench = bench
        self._fleet = fleet
        self._swarm = swarm
        self._rng = rng
        self._recoveries: list[Recovery] = []
        self._undisturbed: list[float] = []
        self._failovers: list[Failover] = []

    async def run(self, checkpoint: Checkpoint, journal: JournalMode) -> FailoverResult:
        options = SessionOptions(journal=journal, on_failover=self._failovers.append)
        model = await self._swarm.load_model(
            str(checkpoint.folder),
            dtype=self._bench.dtype,
            threads=self._bench.threads,
            session_options=options,
        )
        while not self._enough:
            await self._generate(model)
        await model.close()
        return FailoverResult(journal, tuple(self._recoveries), statistics.median(self._undisturbed))

    @property
    def _enough(self) -> bool:
        return len(self._recoveries) >= self._bench.kills and bool(self._undisturbed)

    async def _generate(self, model: RemoteModel) -> None:
        clock = asyncio.get_running_loop().time
        tokens = self._bench.tokens
        async with model.session(max_tokens=tokens) as session:
            generation = model.generate(PROMPT, session=session, max_new_tokens=tokens, min_new_tokens=tokens)
            await anext(generation)
            while generation.finish_reason is None and not self._enough:
                await self._fleet.settle()
                stage = None
                if len(self._recoveries) < self._bench.kills and self._rng.random() < KILL_SHARE:
                    await self._fleet.seen_by(self._swarm)
                    stage = self._rng.randrange(len(session.chain))
                    victim = self._fleet.kill(session.chain.peers[stage])
                    self._fleet.start_soon(victim.span)
                generated, failovers, began = generation.new_tokens, len(self._failovers), clock()
                if await anext(generation, None) is None:
                    break
                seconds = clock() - began
                if stage is None:
                    self._undisturbed.append(seconds)
                else:
                    rebuilt = sum(failover.tokens for failover in self._failovers[failovers:])
                    self._recoveries.append(Recovery(stage, generated, seconds, rebuilt))


def failover_table(results: Sequence[FailoverResult]) -> Table:
    """The figures as people read them."""
    table = Table(title="from kill -9 to the next token, one machine")
    table.add_column("journal of the")
    for name in ("kills", "min s", "median s", "95 % s", "max s", "tokens rebuilt", "undisturbed ms"):
        table.add_column(name, justify="right")
    for result in results:
        rebuilt = statistics.median(recovery.rebuilt_tokens for recovery in result.recoveries)
        table.add_row(
            result.journal,
            str(len(result.recoveries)),
            *(f"{result.seconds(share):.2f}" for share in (0.0, 0.5, 0.95, 1.0)),
            f"{rebuilt:.0f}",
            f"{1000 * result.undisturbed_seconds:.0f}",
        )
    return table

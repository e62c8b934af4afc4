"""One run of training in a simulation, and what is measured in it."""

from __future__ import annotations

import asyncio
import math
import statistics

import attrs

from swarmcore.client.autograd.options import PassOptions
from swarmcore.errors import InputError
from swarmcore.sim.costs import load_costs
from swarmcore.sim.link_times import RATES
from swarmcore.sim.scenario import Scenario
from swarmcore.sim.trainer import MicroBatches, Trainer, TrainingServer, TrainingSwarm
from swarmcore.sim.world import World
from swarmcore.types import Span

WARM_UP = 0.2
"""The part of a run's micro-batches that is not counted: speeds are measured, and the pipeline fills."""

LEAST_ROUNDS = 4
"""Micro-batches of a run at least, in those that are sent at once: of fewer, hardly any would be counted."""

STEPS = 4
"""Steps of a run by steps; the first is not counted."""


@attrs.frozen(kw_only=True)
class Holder:
    """A server of `TrainingSettings.overlapping`."""

    span: str
    speed: float = 1.0


@attrs.frozen(kw_only=True)
class TrainingSettings(Scenario):
    """What a `Training` is run with."""

    stages: int = 3
    speeds: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Of the servers of each stage, against the measured one."""
    stated: tuple[float, ...] = (1.0,)
    """What servers announce against their true speed, in turn."""
    overlapping: tuple[Holder, ...] = ()
    """Servers of another swarm, whose spans do not meet."""
    sequence: int = 128
    sequences: int = 8
    """Of each micro-batch."""
    keep: bool = False
    """Whether servers keep activations; the bound is for servers that keep all or none."""
    client_megabits: float = 10_000.0
    """Of the client's link. Everything passes through it."""
    micro_batches: int = 600
    """In each run, or more where servers need as many to be busy."""
    steps: tuple[int, ...] = (8, 32, 128)
    """Micro-batches of a step, where each step waits for the one before."""
    churn: float = 15.0
    """Seconds between two servers that die or leave, on average; 0 for no such run."""
    repair_seconds: float = 20.0
    """From then until it starts again."""
    links: tuple[float, ...] = RATES
    """Mbit/s of the links for the table of codecs."""

    def __attrs_post_init__(self) -> None:
        if min(self.stages, self.sequence, self.sequences, self.micro_batches, *self.steps) < 1:
            raise InputError("stages, sequence, sequences, micro_batches and steps have to be 1 or more")
        rates = (*self.speeds, *self.stated, *self.links, self.client_megabits, self.repair_seconds)
        rates += tuple(holder.speed for holder in self.overlapping)
        if not self.speeds or not self.stated or not all(0 < rate < math.inf for rate in rates):
            raise InputError("speeds, stated, links, client_megabits and repair_seconds have to be above 0")
        if not 0 <= self.churn < math.inf:
            raise InputError("churn has to be a number of seconds, or 0 for none")
        blocks = load_costs(self.costs).blocks
        if self.stages > blocks:
            raise InputError(f"{self.stages} stages cannot share {blocks} blocks")
        spans = [Span.parse(holder.span) for holder in self.overlapping]
        covered = all(any(block in span for span in spans) for block in range(blocks))
        if spans and not (covered and max(span.end for span in spans) == blocks):
            raise InputError(f"overlapping servers have to hold blocks 0:{blocks} together, and no others")

    @property
    def work(self) -> MicroBatches:
        return MicroBatches((self.sequence,) * self.sequences, self.keep)


@attrs.frozen
class Arm:
    """What is run."""

    name: str
    servers: tuple[tuple[Span, float], ...]
    """Their blocks and speeds."""
    micro_batches: int = 0
    step: int = 0
    """Micro-batches of a step; 0 where all go one by one, as many at once as there is room for."""
    churn: bool = False


@attrs.frozen(kw_only=True)
class ServerShare:
    """What one server did in the counted part of a run."""

    name: str
    span: Span
    speed: float
    share: float
    """Of the work of all servers of the same span."""
    fair: float
    """The same of their speed."""
    busy: float
    """The part of the time that it was at work."""

    @property
    def off(self) -> float:
        """How far the share is from the fair one, as a part of it."""
        return abs(self.share / self.fair - 1)


@attrs.frozen(kw_only=True)
class TrainingResult:
    """What came of one run."""

    name: str
    tokens_per_second: float
    """There and back."""
    bound: float
    """The same through the block whose holders are slowest together; under churn the mean of those online."""
    in_flight: int
    """Micro-batches that are under way at most."""
    micro_batches: int
    shares: tuple[ServerShare, ...]
    deaths: int
    """Servers that died or left."""
    lost: int
    doubled: int
    redone: int
    """Passes that failed and were done again."""
    extra: float
    """Work beyond one pass of each micro-batch through each block and back, as a part of that."""
    problems: tuple[str, ...]
    trace: str
    messages: int

    @property
    def part(self) -> float:
        """Of the bound."""
        return self.tokens_per_second / self.bound

    @property
    def off(self) -> float:
        """The worst of the shares."""
        return max(share.off for share in self.shares)


@attrs.frozen
class _Snapshot:
    """The state of a run at one moment."""

    now: float
    finished: int
    busy: tuple[float, ...]


class TrainingRun:
    """Runs an arm of a scenario in a world of its own."""

    def __init__(self, training: TrainingSettings, seed: int, arm: Arm) -> None:
        self._training, self._arm, self._work = training, arm, training.work
        # Which arm it is leaves network and failures alone.
        self._world = World(f"{seed}/training", training.network, load_costs(training.costs))
        stated = training.stated
        self._servers = [
            TrainingServer(self._world, f"server {n}", span, speed=speed, stated=stated[n % len(stated)])
            for n, (span, speed) in enumerate(arm.servers)
        ]
        self._swarm = TrainingSwarm(self._world, self._servers)
        self._snapshots: list[_Snapshot] = []

    def result(self) -> TrainingResult:
        """Run it."""
        return self._world.run(self._run)

    async def _run(self) -> TrainingResult:
        training, world, work = self._training, self._world, self._work
        options = PassOptions(keep=training.keep)
        runner = await self._swarm.start(options, megabits=training.client_megabits)
        trainer = Trainer(world, runner, work, self._swarm.span)
        in_flight = runner.in_flight
        bound = self._swarm.bound(work)
        churn: Churn | None = None
        if self._arm.churn:
            churn = Churn(self._swarm, training.churn, training.repair_seconds)
            bounds = asyncio.create_task(self._bounds(), name="bounds")
        try:
            await self._train(trainer, in_flight)
        finally:
            if churn is not None:
                await churn.stop()
        begun, ended = self._snapshots
        if churn is not None:
            bound = await bounds
        seconds = ended.now - begun.now
        done = sum(server.speed * server.busy_seconds for server in self._servers)
        needed = len(trainer.finished) * self._needed
        return TrainingResult(
            name=self._arm.name,
            tokens_per_second=(ended.finished - begun.finished) * work.tokens / seconds,
            bound=bound * work.tokens,
            in_flight=in_flight,
            micro_batches=len(trainer.finished),
            shares=tuple(self._shares(begun, ended)),
            deaths=churn.deaths if churn else 0,
            lost=trainer.lost,
            doubled=trainer.doubled,
            redone=runner.redone,
            extra=done / needed - 1,
            problems=(*trainer.problems, *world.problems),
            trace=world.trace.hash,
            messages=world.trace.messages,
        )

    @property
    def _needed(self) -> float:
        """Seconds of a micro-batch through all blocks, at the measured speed."""
        costs = self._world.measured.costs
        spans = {span for span, _ in self._arm.servers}
        # What a batch takes once is spread over its server's blocks; they are alike but for the overlapping.
        blocks = round(sum(map(len, spans)) / len(spans))
        return self._work.seconds(costs, blocks) / blocks * len(self._swarm.span)

    async def _train(self, trainer: Trainer, in_flight: int) -> None:
        if step := self._arm.step:
            for number in range(STEPS):
                await trainer.step(step)
                if number in (0, STEPS - 1):
                    self._take_snapshot(trainer)
            return
        at_once = 2 * in_flight
        many = max(self._arm.micro_batches, LEAST_ROUNDS * at_once)
        # What is counted ends where the first stream does, while all servers still have enough to do.
        trainer.at[int(WARM_UP * many)] = lambda: self._take_snapshot(trainer)
        trainer.at[max(many - at_once, int(WARM_UP * many) + 1)] = lambda: self._take_snapshot(trainer)
        await trainer.streams(many, at_once)

    async def _bounds(self) -> float:
        """The mean of the bounds between the two looks."""
        found = []
        while len(self._snapshots) < 2:
            await asyncio.sleep(1)
            if len(self._snapshots) == 1:
                found.append(self._swarm.bound(self._work, now=True))
        return statistics.fmean(found)

    def _take_snapshot(self, trainer: Trainer) -> None:
        busy = tuple(server.busy_seconds for server in self._servers)
        self._snapshots.append(_Snapshot(self._world.now(), len(trainer.finished), busy))

    def _shares(self, begun: _Snapshot, ended: _Snapshot) -> list[ServerShare]:
        busy = [after - before for before, after in zip(begun.busy, ended.busy, strict=True)]
        shares = []
        for (span, speed), server, seconds in zip(self._arm.servers, self._servers, busy, strict=True):
            alike = [(s, t) for (other, s), t in zip(self._arm.servers, busy, strict=True) if other == span]
            shares.append(
                ServerShare(
                    name=server.name,
                    span=span,
                    speed=speed,
                    share=speed * seconds / max(sum(s * t for s, t in alike), 1e-9),
                    fair=speed / sum(s for s, _ in alike),
                    busy=seconds / (ended.now - begun.now),
                )
            )
        return shares


class Churn:
    """Has servers die, or leave in good order, now and then; each comes back after a while.

    The last holder of a block is spared.
    """

    def __init__(self, swarm: TrainingSwarm, every: float, repair_seconds: float) -> None:
        self.deaths = 0
        self._swarm = swarm
        self._world = swarm.world
        self._every, self._repair_seconds = every, repair_seconds
        self._rng = swarm.world.rng("churn")
        self._world.start(self._run(), "churn")

    async def stop(self) -> None:
        """No more of it; those that are away come back no more."""
        await self._world.stop_tasks()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._every))
            online = [server for server in self._swarm.servers if server.online]
            able = [
                server
                for server in online
                if all(
                    any(other is not server and other.holds(block) for other in online)
                    for block in self._swarm.span
                    if server.holds(block)
                )
            ]
            if not able:
                continue
            self.deaths += 1
            server = self._rng.choice(able)
            leaves = self._rng.random() < 0.5
            if not leaves:
                server.crash()
            self._world.start(self._repair(server, leaves), f"repair {server.name}")

    async def _repair(self, server: TrainingServer, leaves: bool) -> None:
        if leaves:
            await server.leave()
        await asyncio.sleep(self._repair_seconds)
        await server.start([self._swarm.bootstrap.address])

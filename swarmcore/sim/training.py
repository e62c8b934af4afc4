"""Training over servers of different speeds: how the work is shared, how fast it goes, what failures cost.

How micro-batches are spread over servers is that of SWARM parallelism (arXiv 2301.11913); what a step of a
client does is section 2.2 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import attrs

from swarmcore.errors import InputError
from swarmcore.sim.costs import load_costs
from swarmcore.sim.link_times import RATES
from swarmcore.sim.scenario import Progress, Report, Scenario, combined
from swarmcore.sim.trainer import MicroBatches
from swarmcore.sim.training_links import LinkResult, link_runs
from swarmcore.sim.training_run import Arm, TrainingRun
from swarmcore.types import Span


@attrs.frozen(kw_only=True)
class Holder:
    """A server of `Training.overlapping`."""

    span: str
    speed: float = 1.0


@attrs.frozen(kw_only=True)
class Training(Scenario):
    """Shares, throughput against the bottleneck, churn, two chains against one, codecs by link."""

    kind: ClassVar[str] = "training"

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

    def simulate(self, seed: int, progress: Progress) -> Report:
        from swarmcore.sim.training_report import training_report

        arms = self.arms
        total = len(arms) + len(self.links)
        runs = []
        for done, arm in enumerate(arms):
            progress(arm.name, done, total)
            runs.append(TrainingRun(self, seed, arm).result())
        links: list[LinkResult] = []
        for done, rate in enumerate(self.links, len(arms)):
            progress(f"{rate:g} Mbit/s", done, total)
            links += link_runs(self.costs, seed, rate)
        progress("done", total, total)
        report = Report(
            trace=combined([run.trace for run in runs] + [link.trace for link in links]),
            messages=sum(run.messages for run in runs) + sum(link.messages for link in links),
        )
        training_report(self, runs, links, report)
        return report

    @property
    def arms(self) -> list[Arm]:
        """What is run, besides the links."""
        replicas, many = self._replicas(self.speeds), self.micro_batches
        arms = [Arm("steady", replicas, many)]
        arms += [Arm(f"steps of {step}", replicas, step=step) for step in self.steps]
        if self.overlapping:
            spans = tuple((Span.parse(each.span), each.speed) for each in self.overlapping)
            arms.append(Arm("overlapping", spans, many))
        if self.churn:
            arms.append(Arm("churn", replicas, many, churn=True))
        chains = [("one chain", (1.0,)), ("two chains", (1.0, 1.0))]
        return arms + [Arm(name, self._replicas(speeds), many // 2) for name, speeds in chains]

    def _replicas(self, speeds: Sequence[float]) -> tuple[tuple[Span, float], ...]:
        blocks = load_costs(self.costs).blocks
        bounds = [blocks * stage // self.stages for stage in range(self.stages + 1)]
        return tuple((Span(start, end), speed) for start, end in pairwise(bounds) for speed in speeds)

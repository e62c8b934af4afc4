"""Training over servers of different speeds: how the work is shared, how fast it goes, what failures cost.

How micro-batches are spread over servers is that of SWARM parallelism (arXiv 2301.11913); what a step of a
client does is section 2.2 of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import attrs
from rich.table import Table

from swarmcore.sim.costs import load_costs
from swarmcore.sim.link_times import link_times
from swarmcore.sim.scenario import Report, combined
from swarmcore.sim.training_links import AT_ONCE, LinkResult, link_runs
from swarmcore.sim.training_run import Arm, TrainingResult, TrainingRun, TrainingSettings
from swarmcore.types import Progress, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_OFF = 0.05
LEAST_PART = 0.9
LEAST_GAIN = 1.6


@attrs.frozen(kw_only=True)
class Training(TrainingSettings):
    """Shares, throughput against the bottleneck, churn, two chains against one, codecs by link."""

    kind: ClassVar[str] = "training"

    def simulate(self, seed: int, progress: Progress) -> Report:
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
        _fill_in(report, runs, links)
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
        return tuple((span, speed) for span in Span(0, blocks).split(self.stages) for speed in speeds)


def _fill_in(report: Report, runs: Sequence[TrainingResult], links: Sequence[LinkResult]) -> None:
    """Judge what was measured, and put it into tables and a plot."""
    found = {run.name: run for run in runs}
    report.problems += [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    report.problems += [
        f"{run.name}: {run.lost} micro-batches lost, {run.doubled} came back twice"
        for run in runs
        if run.lost or run.doubled
    ]
    steady, gain = found["steady"], _gain(found)
    report.goals["work is shared in proportion to speed within 5 %"] = steady.off <= MOST_OFF
    report.goals["90 % of the bottleneck bound, or more"] = steady.part >= LEAST_PART
    if churn := found.get("churn"):
        report.goals["no micro-batch lost or done twice under churn"] = not (churn.lost or churn.doubled)
    report.goals["two chains: 1.6 times one, or more"] = gain >= LEAST_GAIN
    report.data["runs"] = [{**attrs.asdict(run), "part": run.part, "off": run.off} for run in runs]
    report.data["links"] = [attrs.asdict(link) for link in links]
    report.data["two_chains"] = gain
    report.tables += [_throughputs(runs), _shares(steady)]
    if links:
        report.tables += [_links(links, at_once) for at_once in AT_ONCE]
        report.plot = partial(_plot, runs, links)


def _gain(found: dict[str, TrainingResult]) -> float:
    return found["two chains"].tokens_per_second / found["one chain"].tokens_per_second


def _throughputs(runs: Sequence[TrainingResult]) -> Table:
    table = Table(title="tokens per second, there and back", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("measured", "bound", "part", "died", "lost", "redone", "extra"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.tokens_per_second:,.0f}",
            f"{run.bound:,.0f}",
            f"{run.part:.1%}",
            str(run.deaths),
            str(run.lost),
            str(run.redone),
            f"{max(run.extra, 0.0):.1%}",
        )
    return table


def _shares(run: TrainingResult) -> Table:
    title = f"shares of the work, {run.in_flight} micro-batches under way"
    table = Table(title=title, title_justify="left")
    for name in ("blocks", "speed", "share", "by speed", "off by", "busy"):
        table.add_column(name, justify="right")
    for share in run.shares:
        table.add_row(
            str(share.span),
            f"{share.speed:g}",
            f"{share.share:.1%}",
            f"{share.fair:.1%}",
            f"{share.off:.1%}",
            f"{share.busy:.1%}",
        )
    return table


def _links(links: Sequence[LinkResult], at_once: int) -> Table:
    """Simulated, beside calculated where only one micro-batch is under way."""
    table = Table(
        title=f"seconds per micro-batch over one link, {at_once} under way"
        + (" (calculated)" if at_once == 1 else ""),
        title_justify="left",
    )
    here = [link for link in links if link.at_once == at_once]
    for name in ("Mbit/s", *dict.fromkeys(link.codec for link in here)):
        table.add_column(name, justify="right")
    table.add_column("auto came to, activations / gradients")
    for line in link_times(tuple(dict.fromkeys(link.mbits for link in here))):
        found = [link for link in here if link.mbits == line.mbits]
        cells = [f"{link.seconds:.2f}" for link in found]
        if at_once == 1:
            calculated = {"raw": line.raw, "auto": line.auto}
            cells = [
                f"{cell} ({calculated.get(link.codec, line.fixed):.2f})"
                for cell, link in zip(cells, found, strict=True)
            ]
        used = found[-1].codecs
        table.add_row(f"{line.mbits:g}", *cells, f"{used['activations']} / {used['gradients']}")
    return table


def _plot(runs: Sequence[TrainingResult], links: Sequence[LinkResult], figure: Figure) -> None:
    figure.set_size_inches(10, 4)
    left, right = figure.subplots(1, 2)
    names = [run.name for run in runs]
    left.barh(names, [100 * run.part for run in runs])
    left.axvline(100 * LEAST_PART, color="grey", linestyle=":", linewidth=1)
    left.invert_yaxis()
    left.set_xlabel("% of the bottleneck bound")
    for codec in dict.fromkeys(link.codec for link in links):
        for at_once, style in zip(AT_ONCE, ("--", "-"), strict=True):
            line = [link for link in links if link.codec == codec and link.at_once == at_once]
            right.plot(
                [link.mbits for link in line],
                [link.seconds for link in line],
                linestyle=style,
                marker="o",
                label=f"{codec}, {at_once} at once",
            )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("Mbit/s")
    right.set_ylabel("seconds per micro-batch")
    right.legend()

"""What came of training, for people, for programs and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.sim.link_times import link_times
from swarmcore.sim.scenario import Report
from swarmcore.sim.training_links import AT_ONCE, LinkResult
from swarmcore.sim.training_run import TrainingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from swarmcore.sim.training import Training

MOST_OFF = 0.05
LEAST_PART = 0.9
LEAST_GAIN = 1.6


def training_report(
    training: Training, runs: Sequence[TrainingResult], links: Sequence[LinkResult], report: Report
) -> None:
    """Fill in what was measured."""
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
        report.tables.append(_links(links))
        report.plot = partial(_plot, runs, links)


def _gain(found: dict[str, TrainingResult]) -> float:
    return found["two chains"].tokens_per_second / found["one chain"].tokens_per_second


def _throughputs(runs: Sequence[TrainingResult]) -> Table:
    table = Table(title="tokens per second, there and back", title_justify="left")
    names = (
        "",
        "measured",
        "bound",
        "part",
        "under way",
        "died or left",
        "lost",
        "twice",
        "redone",
        "extra work",
    )
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.tokens_per_second:,.0f}",
            f"{run.bound:,.0f}",
            f"{run.part:.1%}",
            str(run.in_flight),
            str(run.deaths),
            f"{run.lost} of {run.micro_batches + run.lost}",
            str(run.doubled),
            str(run.redone),
            f"{max(run.extra, 0.0):.1%}",
        )
    return table


def _shares(run: TrainingResult) -> Table:
    table = Table(title="shares of the work", title_justify="left")
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


def _links(links: Sequence[LinkResult]) -> Table:
    """Simulated beside calculated, where only one micro-batch is under way."""
    table = Table(title="seconds per micro-batch, by link and codec", title_justify="left")
    table.add_column("Mbit/s", justify="right")
    for at_once in AT_ONCE:
        for codec in dict.fromkeys(link.codec for link in links):
            calculated = " (calculated)" if at_once == 1 else ""
            table.add_column(f"{codec}, {at_once} at once{calculated}", justify="right")
    table.add_column("auto came to, activations / gradients")
    rates = tuple(dict.fromkeys(link.mbits for link in links))
    by_rate = {line.mbits: line for line in link_times(rates)}
    for rate in rates:
        line = by_rate[rate]
        told = {"raw": line.raw, "auto": line.auto}
        here = [link for link in links if link.mbits == rate]
        cells = [
            f"{link.seconds:.2f}"
            + (f" ({told.get(link.codec, line.fixed):.2f})" if link.at_once == 1 else "")
            for link in here
        ]
        used = here[-1].codecs
        table.add_row(f"{rate:g}", *cells, f"{used['activations']} / {used['gradients']}")
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

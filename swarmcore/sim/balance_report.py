"""What came of three ways to balance, for people, for programs and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.sim.balance import Balance, BalanceResult, Balancing
from swarmcore.sim.scenario import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

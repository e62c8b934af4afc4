"""The table of failure rates, for people, for programs and as a plot, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs
from rich.table import Table

from swarmcore.sim.failures import Algorithm, CellResult, FailureTable
from swarmcore.sim.scenario import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

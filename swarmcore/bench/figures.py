"""Measured figures, and the table that people read them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
from rich.table import Table


@attrs.frozen
class Figure:
    """One measured figure of one contender."""

    name: str
    value: float
    unit: str
    """``"ms"``, ``"MB/s"``, ``"ms/MB"``, ``"KB"`` or ``"ratio"``."""


def figures_table(results: Mapping[str, Sequence[Figure]], *, title: str, caption: str) -> Table:
    """A row for each figure, a column for each contender; what a contender lacks stays empty."""
    table = Table(title=title, caption=caption)
    table.add_column("measured")
    for contender in results:
        table.add_column(contender, justify="right")
    table.add_column("unit")
    fullest_first = sorted(results.values(), key=len, reverse=True)
    rows = {(figure.name, figure.unit): None for figures in fullest_first for figure in figures}
    values = {
        (contender, figure.name): figure.value for contender, figures in results.items() for figure in figures
    }
    for name, unit in rows:
        cells = [_cell(values.get((contender, name)), unit) for contender in results]
        table.add_row(name, *cells, unit)
    return table


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    whole = unit == "KB" or (unit == "MB/s" and value >= 100)
    return f"{value:,.{0 if whole else 1 if unit == 'MB/s' else 2}f}"

"""Plots of simulations, drawn by matplotlib, which is loaded only for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from swarmcore.distribution import install_command
from swarmcore.errors import InputError, MissingExtraError, StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_plot_file(file: str) -> None:
    """Find out before a long run that the plot could not be drawn.

    Raise `InputError` for a format other than `FORMATS`, `StorageError` when there is no such folder,
    `MissingExtraError` without matplotlib.
    """
    path = Path(file)
    if path.suffix not in FORMATS:
        raise InputError(f"a plot file ends in {', '.join(FORMATS)}; {file} does not")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"there is no folder {path.parent} to write a plot to; create it first")
    _figure_class()


def save_plot(draw: Callable[[Figure], None], file: str) -> None:
    """Draw into a new figure and write it to ``file``. Raises as `check_plot_file`."""
    figure_class = _figure_class()
    import matplotlib

    # Without these the same figure would be another file each time.
    with matplotlib.rc_context({"svg.hashsalt": "swarmcore"}):
        figure = figure_class(layout="constrained")
        draw(figure)
        metadata = {"Date": None} if Path(file).suffix == ".svg" else {}
        try:
            figure.savefig(file, dpi=110, metadata=metadata)
        except OSError as exc:
            raise StorageError(f"the plot cannot be written to {file}: {exc.strerror or exc}") from exc


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingExtraError(f"plots need matplotlib; install it with: {install_command('sim')}") from exc
    return Figure

"""Tables and bars on a terminal: what strangers named in them cannot act upon it."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment

from swarmcore.cli.progress import BYTES, ProgressReport
from swarmcore.printable import printable


class PrintableConsole(Console):
    """A console on which only rich itself moves the cursor or sets colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class IfSizeKnown(ProgressColumn):
    """A column that is empty beside what has no size."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if task.total is not None else ""


class TerminalProgress(ProgressReport):
    """A bar for each piece of work, redrawn in place on stderr and erased when all that began is done.

    A piece of unknown size is over when something is heard of another one.
    """

    def __init__(self, unit: str = BYTES) -> None:
        super().__init__()
        self._unit = unit
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._unknown: set[str] = set()

    def show(self, what: str, done: int, total: int) -> None:
        bars = self._bars or self._start()
        for other in self._unknown - {what}:
            bars.remove_task(self._tasks.pop(other))
        self._unknown = set() if total else {what}
        if what not in self._tasks:
            self._tasks[what] = bars.add_task(what, total=total or None)
        bars.update(self._tasks[what], completed=done, total=total or None)
        if bars.finished:
            self._stop()

    def _start(self) -> Progress:
        counting: list[ProgressColumn]
        if self._unit == BYTES:
            counting = [DownloadColumn(), TransferSpeedColumn()]
        else:
            counting = [MofNCompleteColumn(), TextColumn(self._unit)]
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *map(IfSizeKnown, counting),
            TimeElapsedColumn(),
            IfSizeKnown(TimeRemainingColumn()),
            console=PrintableConsole(stderr=True),
            transient=True,
        )
        self._bars.start()
        return self._bars

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
        self._unknown.clear()

"""Progress of long work (loading, downloading, converting, simulating), from whichever thread does it.

It is counted in bytes unless another unit is named. A total of 0 means that it is not known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

BYTES = "bytes"

_STEP = 10  # percent between two lines where there is no bar to redraw


class ProgressReport(ABC):
    """Called with what is being done, how much of it is done and how much there is in all.

    A call after the context has ended raises `KeyboardInterrupt`: that is how a thread which still loads for
    a command that has been interrupted comes to its end.
    """

    def __init__(self) -> None:
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._ended:
            raise KeyboardInterrupt("the command was interrupted")
        self.show(what, done, total)

    @abstractmethod
    def show(self, what: str, done: int, total: int) -> None:
        """Bring what is shown up to date."""


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
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        from swarmcore.cli.console import PrintableConsole

        class IfSizeKnown(ProgressColumn):
            """A column that is empty beside what has no size."""

            def __init__(self, column: ProgressColumn) -> None:
                super().__init__()
                self._column = column

            def render(self, task: Task) -> RenderableType:
                return self._column(task) if task.total is not None else ""

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


class _SteppedProgress(ProgressReport):
    """Shows the first call, the last one, and one for each further tenth."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, int] = {}

    def show(self, what: str, done: int, total: int) -> None:
        step = 100 * done // total // _STEP if total else 0
        if self._shown.get(what) != step:
            self._shown[what] = step
            self.show_step(what, done, total)

    @abstractmethod
    def show_step(self, what: str, done: int, total: int) -> None:
        """Show a further tenth."""


class PlainProgress(_SteppedProgress):
    """A line of text for every tenth, for logs and pipes."""

    def __init__(self, write: Callable[[str], None], unit: str = BYTES) -> None:
        super().__init__()
        self._write = write
        self._unit = unit

    def show_step(self, what: str, done: int, total: int) -> None:
        whole = f"{total / 1e6:.1f} MB" if self._unit == BYTES else f"{total} {self._unit}"
        share = f": {100 * done // total} % of {whole}" if total else ""
        self._write(what + share)


class JsonProgress(_SteppedProgress):
    """A ``progress`` event for every tenth."""

    def __init__(self, event: Callable[..., None]) -> None:
        super().__init__()
        self._event = event

    def show_step(self, what: str, done: int, total: int) -> None:
        self._event("progress", what=what, done=done, total=total)

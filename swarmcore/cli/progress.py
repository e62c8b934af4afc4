"""Progress of long work (loading, downloading, converting, simulating), from whichever thread does it.

It is counted in bytes unless another unit is named. A total of 0 means that it is not known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

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

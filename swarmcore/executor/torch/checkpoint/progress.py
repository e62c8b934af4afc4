"""Progress of long work, told to whoever asked for it."""

from __future__ import annotations

from threading import Lock

from swarmcore.executor.loader import Progress as Progress


def no_progress(what: str, done: int, total: int) -> None:
    """The `Progress` of a caller who gave none."""


class Counter:
    """Adds up what several threads have done of one piece of work."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.progress = progress or no_progress
        self._guard = Lock()

    def add(self, count: int) -> None:
        with self._guard:
            self.done += count
            self.progress(self.what, min(self.done, self.total), self.total)

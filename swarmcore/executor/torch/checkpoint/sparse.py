"""Part of a remote file, on disk: a sparse file of the whole's length and a log of the ranges that are in it.

Several processes may read and fill it at once. A range is logged only after its bytes have reached the disk,
so that a crash costs a second download, never wrong weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from swarmcore.executor.torch.checkpoint.ranges import Range, difference, union


class SparseFile:
    """The part of a file of ``size`` bytes that is here. Methods raise `OSError`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._log = path.with_name(f"{path.name}.ranges")

    def have(self) -> list[Range]:
        """The ranges that are here, as any process has left them."""
        try:
            lines = self._log.read_text("ascii").splitlines()
            held = self.path.stat().st_size
        except FileNotFoundError:
            return []
        return union(found for line in lines if (found := _parse(line)) and found[1] <= min(held, self.size))

    def missing(self, wanted: Iterable[Range]) -> list[Range]:
        return difference(wanted, self.have())

    def read(self, start: int, end: int) -> bytes:
        """Bytes that are here, by `have`."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def discard(self) -> None:
        """Remove it from the disk."""
        self._log.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def write(self) -> Writer:
        """A writer, to be used as a context and from any thread."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return Writer(self.path, self._log)


class Writer:
    """Puts bytes in their place, then logs that they are there."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self._data = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except BaseException:
            os.close(self._data)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._data)
        os.close(self._log)

    def put(self, at: int, data: bytes) -> None:
        """Write ``data`` at the position ``at``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._data, view, at)
            view, at = view[written:], at + written

    def log(self, start: int, end: int) -> None:
        """Note that ``start`` to ``end`` is there. One short appended line: whole, or not there at all."""
        if start < end:
            os.fsync(self._data)
            os.write(self._log, f"\n{start} {end} .\n".encode("ascii"))


def _parse(line: str) -> Range | None:
    # The dot shows that the line was written to its end.
    match line.split():
        case [start, end, "."] if start.isdigit() and end.isdigit():
            return int(start), int(end)
    return None

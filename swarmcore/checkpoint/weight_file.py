"""Files with weights, of which parts are read: those on this machine, and what all of them can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from swarmcore.checkpoint.fingerprint import file_hashes
from swarmcore.checkpoint.storage import ProgressCounter, storage_errors
from swarmcore.types import Progress


class WeightFile(ABC):
    """A file with weights, here or elsewhere, of which bytes can be had. Methods block."""

    label: str
    """What errors call it."""
    size: int

    @abstractmethod
    def read(self, start: int, end: int) -> bytes:
        """These bytes, fetched if need be; fewer where the file has become shorter."""

    @abstractmethod
    def fetch(self, ranges: Collection[tuple[int, int]], report: ProgressCounter) -> None:
        """Make sure that these bytes are here."""

    @abstractmethod
    def missing(self, ranges: Collection[tuple[int, int]]) -> int:
        """How many of these bytes `fetch` would have to download."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the bytes are that are here, each at its place in the whole file."""

    @abstractmethod
    def sha256(self, cache: Path, progress: Progress) -> str:
        """Of the whole file, in hex."""


class LocalFile(WeightFile):
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._path = path
        with storage_errors("reading the model", path):
            self.size = path.stat().st_size

    @property
    def path(self) -> Path:
        return self._path

    def read(self, start: int, end: int) -> bytes:
        with storage_errors("reading the model", self._path), self._path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def fetch(self, ranges: Collection[tuple[int, int]], report: ProgressCounter) -> None:
        pass

    def missing(self, ranges: Collection[tuple[int, int]]) -> int:
        return 0

    def sha256(self, cache: Path, progress: Progress) -> str:
        (digest,) = file_hashes([self._path], self._path.name, cache, progress)
        return digest

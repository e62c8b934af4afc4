"""A file of a hub's repository, of which only the bytes that are asked for are downloaded, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from swarmcore.checkpoint.download import Downloader, Range, SparseFile, length
from swarmcore.checkpoint.hub import Repository, hub_folder
from swarmcore.checkpoint.storage import ProgressCounter, storage_errors
from swarmcore.checkpoint.weight_file import WeightFile
from swarmcore.errors import CheckpointError
from swarmcore.types import Progress

MAX_SMALL = 256 * 1024 * 1024
"""Bytes of files that are read whole where nothing else will do."""


class HubFile(WeightFile):
    """What of the file is here, and how to get the rest. One that the hub library has whole is read there."""

    def __init__(
        self, file: str, repository: Repository, cache: Path, endpoint: str | None, downloader: Downloader
    ) -> None:
        listed = repository.files[file]
        self.label, self.size = f"{file} of {repository.model}", listed.size
        self._listed, self._file, self._repository = listed, file, repository
        self._cache, self._downloader = cache, downloader
        self._remote = repository.remote(file, endpoint)
        self._sparse = SparseFile(
            hub_folder(cache, endpoint) / "blobs" / (listed.sha256 or listed.blob), listed.size
        )
        whole = try_to_load_from_cache(repository.model, file, revision=repository.commit)
        found = isinstance(whole, str) and Path(whole).stat().st_size == listed.size
        self._whole = Path(str(whole)) if found else None

    @property
    def is_whole(self) -> bool:
        """Whether all of it was here from the start."""
        return self._whole is not None

    @property
    def path(self) -> Path:
        return self._whole or self._sparse.path

    def missing(self, ranges: Collection[Range]) -> int:
        return 0 if self._whole else length(self._sparse.missing(ranges))

    def fetch(self, ranges: Collection[Range], report: ProgressCounter) -> None:
        if not self._whole:
            self._downloader.fetch(self._remote, self._sparse, ranges, self._cache, report)

    def read(self, start: int, end: int, progress: Progress | None = None) -> bytes:
        report = ProgressCounter(f"listing the tensors of {self._repository.model}", end - start, progress)
        self.fetch([(start, end)], report)
        with storage_errors(report.what, self.path), self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def sha256(self, cache: Path, progress: Progress) -> str:
        """As listed by the hub, which does so for files in large file storage: all but very small weights."""
        if self._listed.sha256 is not None:
            return self._listed.sha256
        if self.size > MAX_SMALL:
            raise CheckpointError(
                f"the hub lists no SHA-256 for {self.label}, so the weights have no identity"
            )
        content = self.read(0, self.size, progress)
        self._repository.check(self._file, content)
        return hashlib.sha256(content).hexdigest()

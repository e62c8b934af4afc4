"""A checkpoint on a hub: only the byte ranges of the tensors that are read are downloaded, and kept.

In the cache folder, ``hub/HOST/models--ORG--NAME/snapshots/COMMIT/`` holds config and tokenizer, and
``hub/HOST/blobs/`` the downloaded parts of weight files under their SHA-256, so that commits with the same
weights share them. A weight file that the hub library has downloaded whole is read from its own cache.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from swarmcore.checkpoint.base import (
    ADAPTER,
    Checkpoint,
    describe,
    load_config,
    missing_tensors,
    read_json,
)
from swarmcore.checkpoint.download import Downloader, Range, SparseFile
from swarmcore.checkpoint.fingerprint import model_fingerprint
from swarmcore.checkpoint.folder import (
    Entry,
    header_length,
    no_weights,
    parse_header,
    parse_index,
    read_header,
    read_tensors,
)
from swarmcore.checkpoint.hub import Repository, repository_folder, resolve
from swarmcore.checkpoint.hub_file import MAX_SMALL, HubFile
from swarmcore.checkpoint.location import INDEX, WEIGHTS
from swarmcore.checkpoint.quantization_settings import QUANTIZATION_FILES
from swarmcore.checkpoint.storage import (
    ProgressCounter,
    check_room,
    locked,
    no_progress,
    storage_errors,
    write_file,
)
from swarmcore.errors import CheckpointError
from swarmcore.types import Progress

SMALL_FILES = frozenset(
    {
        "config.json", "generation_config.json", INDEX, ADAPTER, *QUANTIZATION_FILES,
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
        "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
"""What is downloaded whole. Nothing else is, so no code and no pickles."""

_HEADER_GUESS = 32 * 1024
"""What is asked for first of a weight file: most headers fit, and few bytes of tensors come along."""


class HubCheckpoint(Checkpoint):
    """Opens a model of a hub: resolves its commit, downloads its small files, lists its tensors."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        cache: Path,
        *,
        progress: Progress | None = None,
        endpoint: str | None = None,
        downloader: Downloader | None = None,
        repository: Repository | None = None,
    ) -> None:
        """Raise `ModelNotFoundError`, `ModelHubError`, `CheckpointError` or `StorageError`.

        ``repository`` is what the hub has said of the model, where it has been asked.
        """
        self.name = model
        self._cache = cache
        self._endpoint = endpoint
        self._downloader = downloader or Downloader()
        self._repository = repository or resolve(model, revision, cache, endpoint)
        self.folder = repository_folder(model, cache, endpoint) / "snapshots" / self._repository.commit
        if not has_safetensors(self._repository):
            raise no_weights(model, self._repository.files)
        self._download_small_files(progress)
        self.config, self.raw_config = load_config(self.folder, model)
        self._shards: dict[str, _Shard] = {}
        self._weight_map = self._map_weights(progress)
        weights = [
            self._shard(file).sha256(cache, progress or no_progress)
            for file in sorted(set(self._weight_map.values()))
        ]
        fingerprint = model_fingerprint(self.raw_config, weights)
        self.info = describe(model, self.config, fingerprint)

    @property
    def commit(self) -> str:
        """The commit that all files are of."""
        return self._repository.commit

    def names(self) -> Collection[str]:
        return self._weight_map.keys()

    def stored_dtype(self) -> torch.dtype | None:
        entries = self._shard(next(iter(self._weight_map.values()))).entries(None)
        return next((entry.dtype for entry in entries.values() if entry.dtype.is_floating_point), None)

    def nbytes(self, names: Collection[str]) -> int:
        return sum(entry.nbytes for entries in self._select(names, None).values() for entry in entries)

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        wanted = self._select(names, progress)
        with storage_errors(f"downloading {self.name}", self._cache):
            absent = sum(shard.missing(_ranges(entries)) for shard, entries in wanted.items())
        if absent:
            report = ProgressCounter(f"downloading {self.name}", absent, progress)
            check_room(report.what, self._cache, absent)
            for shard, entries in wanted.items():
                shard.fetch(_ranges(entries), report)
        report = ProgressCounter(f"reading {self.name}", self.nbytes(names), progress)
        tensors: dict[str, torch.Tensor] = {}
        for shard, entries in wanted.items():
            tensors |= read_tensors(shard.path, entries, report)
        return tensors

    def _select(self, names: Collection[str], progress: Progress | None) -> dict[_Shard, list[Entry]]:
        if missing := set(names) - self._weight_map.keys():
            raise missing_tensors(self.name, missing)
        wanted: dict[_Shard, list[Entry]] = {}
        for name in dict.fromkeys(names):
            shard = self._shard(self._weight_map[name])
            entry = shard.entries(progress).get(name)
            if entry is None:
                raise CheckpointError(f"{shard.label} lacks the tensor {name} that {INDEX} promises")
            wanted.setdefault(shard, []).append(entry)
        return wanted

    def _map_weights(self, progress: Progress | None) -> dict[str, str]:
        if WEIGHTS in self._repository.files:
            return dict.fromkeys(self._shard(WEIGHTS).entries(progress), WEIGHTS)
        weight_map = parse_index(read_json(self.folder / INDEX), f"{INDEX} of {self.name}")
        if absent := set(weight_map.values()) - self._repository.files.keys():
            raise CheckpointError(f"{self.name} is incomplete on its hub: it has no {min(absent)}")
        return weight_map

    def _shard(self, file: str) -> _Shard:
        if file not in self._shards:
            self._shards[file] = _Shard(file, self._repository, self._cache, self._endpoint, self._downloader)
        return self._shards[file]

    def _download_small_files(self, progress: Progress | None) -> None:
        if not self._absent():
            return
        what = f"waiting for another process that opens {self.name}"
        with locked(self.folder, self._cache, what, progress or no_progress):
            self._download_absent(progress)

    def _absent(self) -> list[str]:
        files = sorted(SMALL_FILES & self._repository.files.keys())
        return [file for file in files if not (self.folder / file).is_file()]

    def _download_absent(self, progress: Progress | None) -> None:
        listed, absent = self._repository.files, self._absent()
        report = ProgressCounter(
            f"downloading {self.name}", sum(listed[file].size for file in absent), progress
        )
        for file in absent:
            size = listed[file].size
            if size > MAX_SMALL:
                raise CheckpointError(f"{file} of {self.name} has {size} bytes, far too many for such a file")
            part = SparseFile(self.folder / ".parts" / file, size)
            remote = self._repository.remote(file, self._endpoint)
            self._downloader.fetch(remote, part, [(0, size)], self._cache, report)
            with storage_errors(report.what, self.folder):
                content = part.read(0, size) if size else b""
                part.discard()
                self._repository.check(file, content)
                write_file(self.folder / file, content)


class _Shard(HubFile):
    """One weight file of a repository, and the tensors in it."""

    _entries: dict[str, Entry] | None = None

    def entries(self, progress: Progress | None) -> dict[str, Entry]:
        if self._entries is None:
            self._entries = read_header(self.path) if self.is_whole else self._read_header(progress)
        return self._entries

    def _read_header(self, progress: Progress | None) -> dict[str, Entry]:
        start = self.read(0, min(self.size, _HEADER_GUESS), progress)
        end = 8 + header_length(start, self.label, self.size)
        return parse_header(self.read(0, end, progress)[8:], self.label, self.size)


def _ranges(entries: Collection[Entry]) -> list[Range]:
    return [(entry.start, entry.end) for entry in entries]


def has_safetensors(repository: Repository) -> bool:
    """Whether there are weights in safetensors in it, or an adapter."""
    return bool(repository.files.keys() & {WEIGHTS, INDEX, ADAPTER})

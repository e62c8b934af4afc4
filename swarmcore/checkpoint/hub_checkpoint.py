"""A checkpoint on a hub: only the byte ranges of the tensors that are read are downloaded, and kept.

In the cache folder, ``hub/HOST/models--ORG--NAME/snapshots/COMMIT/`` holds config and tokenizer, and
``hub/HOST/blobs/`` the downloaded parts of weight files under their SHA-256, so that commits with the same
weights share them. A weight file that the hub library has downloaded whole is read from its own cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from swarmcore.checkpoint.base import (
    ADAPTER,
    Checkpoint,
    describe,
    load_config,
    missing_tensors,
    read_json,
)
from swarmcore.checkpoint.download import Downloader, Range, SparseFile, length
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
from swarmcore.checkpoint.hub import Repository, hub_folder, repository_folder, resolve
from swarmcore.checkpoint.location import INDEX, WEIGHTS
from swarmcore.checkpoint.quantized import QUANTIZATION_FILES
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

_SMALL = 256 * 1024 * 1024
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
    ) -> None:
        """Raise `ModelNotFoundError`, `ModelHubError`, `CheckpointError` or `StorageError`."""
        self.name = model
        self._cache = cache
        self._endpoint = endpoint
        self._downloader = downloader or Downloader()
        self._repository = resolve(model, revision, cache, endpoint)
        self.folder = repository_folder(model, cache, endpoint) / "snapshots" / self._repository.commit
        files = self._repository.files
        if not files.keys() & {WEIGHTS, INDEX, ADAPTER}:
            raise _not_loadable(model, files)
        self._download_small_files(progress)
        self.config, self.raw_config = load_config(self.folder, model)
        self._shards: dict[str, _Shard] = {}
        self._weight_map = self._map_weights(progress)
        weights = [self._shard(file).sha256(progress) for file in sorted(set(self._weight_map.values()))]
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
            absent = sum(length(shard.missing(_ranges(entries))) for shard, entries in wanted.items())
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
            if size > _SMALL:
                raise CheckpointError(f"{file} of {self.name} has {size} bytes, far too many for such a file")
            part = SparseFile(self.folder / ".parts" / file, size)
            remote = self._repository.remote(file, self._endpoint)
            self._downloader.fetch(remote, part, [(0, size)], self._cache, report)
            with storage_errors(report.what, self.folder):
                content = part.read(0, size) if size else b""
                part.discard()
                self._repository.check(file, content)
                write_file(self.folder / file, content)


class _Shard:
    """One weight file of a repository: what of it is here, and how to get the rest."""

    def __init__(
        self, file: str, repository: Repository, cache: Path, endpoint: str | None, downloader: Downloader
    ) -> None:
        listed = repository.files[file]
        self.label = f"{file} of {repository.model}"
        self._listed, self._file, self._repository = listed, file, repository
        self._cache, self._downloader = cache, downloader
        self._remote = repository.remote(file, endpoint)
        self._sparse = SparseFile(
            hub_folder(cache, endpoint) / "blobs" / (listed.sha256 or listed.blob), listed.size
        )
        self._entries: dict[str, Entry] | None = None
        whole = try_to_load_from_cache(repository.model, file, revision=repository.commit)
        found = isinstance(whole, str) and Path(whole).stat().st_size == listed.size
        self._whole = Path(str(whole)) if found else None

    @property
    def path(self) -> Path:
        return self._whole or self._sparse.path

    def missing(self, wanted: Collection[Range]) -> list[Range]:
        return [] if self._whole else self._sparse.missing(wanted)

    def fetch(self, wanted: Collection[Range], report: ProgressCounter) -> None:
        if not self._whole:
            self._downloader.fetch(self._remote, self._sparse, wanted, self._cache, report)

    def entries(self, progress: Progress | None) -> dict[str, Entry]:
        if self._entries is None:
            self._entries = read_header(self._whole) if self._whole else self._read_header(progress)
        return self._entries

    def sha256(self, progress: Progress | None) -> str:
        """As listed by the hub, which does so for files in large file storage: all but very small weights."""
        if self._listed.sha256 is not None:
            return self._listed.sha256
        if self._listed.size > _SMALL:
            raise CheckpointError(
                f"the hub lists no SHA-256 for {self.label}, so the weights have no identity"
            )
        content = self._bytes(0, self._listed.size, progress)
        self._repository.check(self._file, content)
        return hashlib.sha256(content).hexdigest()

    def _read_header(self, progress: Progress | None) -> dict[str, Entry]:
        size = self._listed.size
        start = self._bytes(0, min(size, _HEADER_GUESS), progress)
        end = 8 + header_length(start, self.label, size)
        return parse_header(self._bytes(0, end, progress)[8:], self.label, size)

    def _bytes(self, start: int, end: int, progress: Progress | None) -> bytes:
        report = ProgressCounter(f"listing the tensors of {self._repository.model}", end - start, progress)
        self.fetch([(start, end)], report)
        with storage_errors(report.what, self.path), self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def _ranges(entries: Collection[Entry]) -> list[Range]:
    return [(entry.start, entry.end) for entry in entries]


def _not_loadable(model: str, files: Collection[str]) -> CheckpointError:
    if gguf := sorted(file for file in files if file.endswith(".gguf")):
        return CheckpointError(
            f"{model} has GGUF files only; download one (hf download {model} {gguf[0]} --local-dir .) and "
            f"name that file"
        )
    return no_weights(model, files)

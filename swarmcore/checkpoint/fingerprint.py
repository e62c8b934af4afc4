"""A model's fingerprint: equal files give equal fingerprints, on every machine and from every source.

It is the hash of two things: the part of config.json that decides what the blocks compute, and the SHA-256 of
each weight file. A hub lists the latter, so nothing is downloaded for it; for local files they are computed
once and remembered under the file's device, inode, size and times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from swarmcore.checkpoint.storage import ProgressCounter, locked, storage_errors, write_file
from swarmcore.errors import CheckpointError
from swarmcore.types import Progress

log = logging.getLogger(__name__)

_CHUNK = 4 * 1024 * 1024
_THREADS = 4

_NOT_OF_THE_BLOCKS = frozenset(
    {
        "_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "architectures",
        "auto_map", "torch_dtype", "dtype", "use_cache", "attn_implementation", "_attn_implementation",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict",
        "task_specific_params", "id2label", "label2id",
    }
)  # fmt: skip
"""Keys of config.json that are rewritten by saving it again, or that only generation reads."""


def model_fingerprint(config: dict[str, Any], weights: Collection[str]) -> str:
    """The fingerprint of a model with this config.json and weight files with these SHA-256 sums (hex)."""
    text = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"))
    return _digest("safetensors", text, *sorted(weights))


def conversion_fingerprint(source_sha256: str, layout: str) -> str:
    """The fingerprint of what the conversion ``layout`` makes of a file with this SHA-256."""
    return _digest("converted", layout, source_sha256)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(("swarmcore model 1", *parts)).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _canonical(item)
            for key, item in value.items()
            if key not in _NOT_OF_THE_BLOCKS and item is not None
        }
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


class _Remembered(msgspec.Struct):
    stamp: tuple[int, int, int]
    sha256: str


def file_hashes(paths: Sequence[Path], name: str, cache: Path, progress: Progress) -> list[str]:
    """The SHA-256 of each file, in hex. Computed once for a file, and again when it has changed.

    ``name`` is what the progress calls them. Raise `StorageError` when a file cannot be read.
    """
    known = {path: found for path in paths if (found := _recall(path, cache))}
    unknown = [path for path in dict.fromkeys(paths) if path not in known]
    if unknown:
        known |= _compute(unknown, name, cache, progress)
    return [known[path] for path in paths]


def _compute(paths: Sequence[Path], name: str, cache: Path, progress: Progress) -> dict[Path, str]:
    what = f"checking {name}"

    def hash_file(path: Path) -> str:
        before = path.stat()
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                report.add(len(chunk))
        if _stamp(path.stat()) != _stamp(before):
            raise CheckpointError(f"{path} is being written by another program; wait until that has finished")
        _remember(path, before, digest.hexdigest(), cache)
        return digest.hexdigest()

    with (
        storage_errors("reading the weights", paths[0]),
        locked(paths[0], cache, f"waiting for another process that is {what}", progress),
    ):
        known = {path: found for path in paths if (found := _recall(path, cache))}
        rest = [path for path in paths if path not in known]
        report = ProgressCounter(what, sum(path.stat().st_size for path in rest), progress)
        with ThreadPoolExecutor(_THREADS) as pool:
            return known | dict(zip(rest, pool.map(hash_file, rest), strict=True))


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _record(stat: os.stat_result, cache: Path) -> Path:
    # Not under the path: a file that is renamed, or moved within its disk, keeps its hash.
    return cache / "hashes" / f"{stat.st_dev:x}-{stat.st_ino:x}.json"


def _recall(path: Path, cache: Path) -> str | None:
    try:
        stat = path.stat()
        found = msgspec.json.decode(_record(stat, cache).read_bytes(), type=_Remembered)
    except (OSError, msgspec.DecodeError):
        return None
    return found.sha256 if found.stamp == _stamp(stat) else None


def _remember(path: Path, stat: os.stat_result, sha256: str, cache: Path) -> None:
    record = _Remembered(_stamp(stat), sha256)
    try:
        write_file(_record(stat, cache), msgspec.json.encode(record))
    except OSError as exc:  # the hash is right all the same, it is only not remembered
        log.warning("cannot remember the hash of %s: %s", path, exc)

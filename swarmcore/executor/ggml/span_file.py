"""The GGUF of a span in the cache folder: written once, found again, shared by all processes that map it.

It is named by the model's fingerprint, the span and the version of what is written here, and takes its name
when it is whole. Whoever uses it holds a lock on it that others share, so that it is not removed meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.gguf_writer import GgufContent
from swarmcore.checkpoint.storage import (
    ProgressCounter,
    cache_folder,
    check_room,
    free_bytes,
    locked,
    no_progress,
    storage_errors,
)
from swarmcore.executor.ggml.span_cut import cut_span
from swarmcore.types import Progress, Span

FORMAT = 1
"""Version of what is written: count it up when the same span of the same model is written in another way."""
FOLDER = "spans"
"""In the cache folder."""

_KEPT = 1
"""Spans of a model that are kept, the last ones used, besides those in use."""
_KEPT_FOR = 7 * 24 * 3600.0
"""Seconds for which the unused spans of other models are kept."""
_ABANDONED = 3600.0
"""Seconds without a write after which a half-written file is that of a writer that was killed."""


class SpanFile:
    """A finished span GGUF, which nobody removes until `close`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.nbytes = os.fstat(file.fileno()).st_size
        self._file = file

    def close(self) -> None:
        """Let it be removed when room is needed. Harmless when repeated."""
        self._file.close()

    def __enter__(self) -> SpanFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SpanFile {self.path.name} · {self.nbytes} bytes>"


def span_file(
    model: GgufModel, span: Span, *, cache: Path | None = None, progress: Progress | None = None
) -> SpanFile:
    """The GGUF of the blocks ``span``: layers numbered from 0, without a vocabulary, all bytes as they are.

    Found in the cache folder, else written there, with only the span's bytes downloaded where the model is
    on a hub. When another process is writing it, waits for that. Blocks: run it in a thread.

    Raise `SpanError` for blocks that the model does not have, `UnsupportedModelError` where they cannot be
    cut out, `CheckpointError` for damaged files, `StorageError` when there is no room for it, and
    `ModelHubError` when a download cannot be finished.
    """
    cache, progress = cache_folder(cache), progress or no_progress
    cut = cut_span(model, span)
    fingerprint = model.info(cache, progress).fingerprint
    stem = re.sub(r"[^\w.-]", "_", model.name)[:100]
    target = cache / FOLDER / f"{stem}-{fingerprint[:16]}-{span.start}-{span.end}-v{FORMAT}.gguf"
    while True:
        if (found := _held(target, cut.nbytes)) is not None:
            return found
        what = f"waiting for another process that writes blocks {span} of {model.name}"
        with locked(target, cache, what, progress):
            if (found := _held(target, cut.nbytes)) is not None:
                return found
            _write(model, cut, target, progress)
            found = _held(target, cut.nbytes)
        _tidy(target)
        if found is not None:
            return found


def _write(model: GgufModel, cut: GgufContent, target: Path, progress: Progress) -> None:
    """Write ``target``, all or nothing. The caller holds its lock."""
    doing = f"writing blocks of {model.name} as {target.name}"
    part = target.with_name(f".{target.name}.part")
    with storage_errors(doing, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # of a writer that was killed
    _make_room(doing, target, cut.nbytes)
    if absent := model.missing(cut.sources):
        check_room(f"downloading {model.name}", target, absent + cut.nbytes)
        model.fetch(cut.sources, ProgressCounter(f"downloading {model.name}", absent, progress))
    try:
        with storage_errors(doing, target, cut.nbytes), part.open("wb", buffering=0) as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            cut.write(model, file, ProgressCounter(doing, cut.nbytes, progress))
            os.fsync(file.fileno())
        with storage_errors(doing, target):
            part.replace(target)
            _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _held(path: Path, size: int) -> SpanFile | None:
    """The finished file, kept from being removed; None where there is none of this size."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as exc:
        with storage_errors("opening a span's weights", path):
            raise exc
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        if found.st_size == size and found.st_nlink:
            with suppress(OSError):  # read-only, or another user's: only the order of removal suffers
                os.utime(path)
            return SpanFile(path, file)
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _make_room(doing: str, target: Path, needed: int) -> None:
    """Remove spans that nobody uses, the longest unused first, until ``needed`` bytes are free."""
    for path in _by_age(target.parent, "*.gguf"):
        if needed <= free_bytes(target):
            break
        _remove_unused(path)
    check_room(doing, target, needed)


def _tidy(target: Path) -> None:
    """Remove what nobody uses: of the model of ``target`` all spans but the last, of others old ones."""
    now, same = time.time(), target.name.rsplit("-", 3)[0]
    spans = [path for path in _by_age(target.parent, "*.gguf") if path != target]
    mine = [path for path in spans if path.name.rsplit("-", 3)[0] == same]
    others = [path for path in spans if path not in mine and _age(path, now) > _KEPT_FOR]
    parts = [path for path in _by_age(target.parent, ".*.part") if _age(path, now) > _ABANDONED]
    for path in [*mine[: max(0, len(mine) - _KEPT)], *others, *parts]:
        _remove_unused(path)


def _by_age(folder: Path, pattern: str) -> list[Path]:
    """The files of that pattern, the one that was not used for the longest time first."""
    now = time.time()
    return sorted(folder.glob(pattern), key=lambda path: -_age(path, now))


def _age(path: Path, now: float) -> float:
    """Seconds since the file was last used, or written to; 0 for one that has just gone."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove_unused(path: Path) -> None:
    """Remove the file unless somebody holds it."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)

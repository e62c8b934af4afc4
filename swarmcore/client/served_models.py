"""From what a client calls a model to one that the swarm serves, and to where its own part of it is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from swarmcore.errors import (
    InputError,
    MissingBlocksError,
    ModelHubError,
    ModelMismatchError,
    ModelNotFoundError,
    SwarmError,
)
from swarmcore.registry.base import SwarmView
from swarmcore.sources import Source, exists_here
from swarmcore.types import ModelInfo, PeerId

if TYPE_CHECKING:
    from swarmcore.checkpoint import Checkpoint
    from swarmcore.types import Progress

MOST_SOURCES = 3
"""Sources of one model that are tried."""


@attrs.frozen
class ServedModel:
    """A model of the swarm, and the public places that its servers name, the one that most name first."""

    info: ModelInfo
    sources: tuple[Source, ...]

    def __str__(self) -> str:
        return called(self.info)


def called(model: ModelInfo) -> str:
    """A model as errors name it: its name, enough of its fingerprint, and its source."""
    source = f", {model.source}" if model.source and model.source != model.name else ""
    return f"{model.name} ({model.fingerprint[:12]}{source})"


def may_be_served(name: str) -> bool:
    """Whether ``name`` could be the swarm's for a model: it is no file, folder or place by itself."""
    return not (name.startswith(("pypi:", "gguf:")) or "/" in name or exists_here(name))


def find_served(
    view: SwarmView, name: str | None, *, admits: Callable[[PeerId], bool] = lambda peer: True
) -> ServedModel | None:
    """The model of ``view`` that ``name`` stands for: a name or fingerprint that servers announce.

    Without a name it is the only one there is. None when ``name`` is a source of its own: a file or folder
    here, ``pypi:…``, a hub id ``org/name``, or anything that no server announces as a name. Peers that are
    not admitted do not count. Raise `MissingBlocksError` when no model is served, `InputError` when it takes
    a name to tell which.
    """
    offers = [info for info in view if info.model is not None and admits(info.peer)]
    if name is None:
        found = {info.model.fingerprint: info.model for info in offers if info.model is not None}
        if not found:
            raise MissingBlocksError(
                "nobody in this swarm serves a model yet; start: swarmcore serve --model MODEL", ranges=[]
            )
    else:
        if not may_be_served(name):
            return None
        if any(info.model is not None and info.model.source == name for info in offers):
            return None
        found = {
            info.model.fingerprint: info.model
            for info in offers
            if info.model is not None and name in (info.model.name, info.model.fingerprint)
        }
        if not found:
            return None
    if len(found) > 1:
        raise InputError(
            f"the swarm serves {_listed(found.values())}; say which, by its fingerprint, or as the folder, "
            f"GGUF file or hub id that it is"
        )
    (info,) = found.values()
    named = Counter(
        offer.model.source for offer in offers if offer.model is not None and offer.model.fingerprint in found
    )
    places = [Source.parse(text) for text, _ in sorted(named.items(), key=lambda item: (-item[1], item[0]))]
    return ServedModel(info, tuple(place for place in places if place is not None)[:MOST_SOURCES])


def open_model(
    name: str | None,
    served: ServedModel | None,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """The checkpoint that ``name`` stands for, with ``served``, what `find_served` made of it.

    Blocks: run it in a thread. A hub id goes before what strangers call their models. Raises as
    `open_checkpoint` and `open_served` do.
    """
    from swarmcore.checkpoint import open_checkpoint

    if name is not None and (served is None or name != served.info.fingerprint):
        try:
            return open_checkpoint(name, revision=revision, cache_dir=cache_dir, progress=progress)
        except ModelNotFoundError:
            if served is None:
                raise
    assert served is not None, "without a name there is what is served, or an error"
    return open_served(served, revision=revision, cache_dir=cache_dir, progress=progress)


def open_served(
    served: ServedModel,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """The checkpoint of ``served``, from a place that its servers name. Blocks: run it in a thread.

    What is found there is taken only if it has the fingerprint that the swarm serves. Raise
    `ModelNotFoundError` when they name no public place, and what the last place gave when none will do.
    """
    from swarmcore.checkpoint import open_checkpoint

    error: SwarmError = ModelNotFoundError(
        f"the swarm serves {served}, which its servers have from files of their own; say in which folder, "
        f"GGUF file or hub id it is here"
    )
    for source in served.sources:
        if progress is not None:
            progress(f"loading {source}, where servers have {served.info.name} from", 0, 0)
        try:
            checkpoint = open_checkpoint(
                source.name, revision=revision or source.revision, cache_dir=cache_dir, progress=progress
            )
        except (InputError, ModelHubError) as exc:
            error = exc
            continue
        if checkpoint.info.fingerprint == served.info.fingerprint:
            return checkpoint
        error = ModelMismatchError(
            f"{source}, which servers name as the source of {served}, holds other weights "
            f"({checkpoint.info.fingerprint[:12]}); say in which folder, GGUF file or hub id the model is"
        )
    raise error


def _listed(models: Iterable[ModelInfo]) -> str:
    return ", ".join(sorted(map(called, models)))

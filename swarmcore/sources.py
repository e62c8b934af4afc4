"""Where a model is found by others: what a server says of it, and what of that another machine may load.

A name or a source that a peer announces is a claim. A source is used only when it names a public place, never
a file, and what is found there has to have the fingerprint that was announced with it.
"""

from __future__ import annotations

import re
from pathlib import Path

import attrs

from swarmcore.types import ModelInfo

MAX_SOURCE = 200
"""Characters of an announced source."""

_PYPI = re.compile(r"pypi:[A-Za-z0-9][\w.-]*(?:==[\w.]+)?", re.ASCII)
_WORD = r"[A-Za-z0-9][\w.-]*"
_HUB = re.compile(rf"({_WORD}(?:/{_WORD}(?::{_WORD})?)?)(?:@({_WORD}))?", re.ASCII)


@attrs.frozen
class Source:
    """A public place of a model: ``pypi:PACKAGE``, or a hub id with or without a revision.

    The id of a model in GGUF may say which of those in its repository: ``org/name:Q4_K_M``.
    """

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source | None:
        """What ``text``, said by a stranger, names; None when that is no public place, or a file here."""
        if len(text) > MAX_SOURCE or ".." in text:
            return None
        if _PYPI.fullmatch(text):
            return cls(text)
        match = _HUB.fullmatch(text)
        return cls(match[1], match[2]) if match and not exists_here(match[1]) else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def announced_source(model: str, revision: str | None = None) -> str:
    """What a peer that was started with ``model`` tells others of it: "" for files of its own."""
    if exists_here(model):
        return ""
    text = str(Source(model, None if model.startswith("pypi:") else revision))
    return text if Source.parse(text) is not None else ""


def is_called(model: ModelInfo, name: str) -> bool:
    """Whether ``name`` stands for ``model``: name, fingerprint or source, or a path that ends in its name."""
    if name in (model.name, model.fingerprint):
        return True
    if model.source and name in (model.source, model.source.partition("@")[0]):
        return True
    path = Path(name)
    return len(path.parts) > 1 and model.source == "" and model.name in (path.name, path.stem)


def exists_here(place: str) -> bool:
    """Whether ``place`` is a file or folder on this machine."""
    try:
        return Path(place.removeprefix("gguf:")).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or no home
        return False

"""What an executor's entry point names: a `BlockLoader`, which opens a model and loads blocks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import attrs

from swarmcore.errors import InputError
from swarmcore.executor.base import BlockExecutor
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.plugins import PluginGroup
from swarmcore.types import ModelInfo, Progress, Span

EXECUTORS = PluginGroup("executor", "swarmcore.executors", extras={"torch": "torch"})
"""The installed back ends; each entry point is a `BlockLoader` subclass."""


@attrs.frozen(kw_only=True)
class LoadSettings:
    """Which model a server loads, and on which device."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    """Compute threads; None for the back end's own choice."""
    batch_tokens: int = 512
    """Most tokens of one batch."""


class BlockLoader(ABC):
    """A model that is opened, of which blocks can be loaded for a server.

    Every method may block (disk, network) and is called in a thread, one at a time.
    """

    model: ModelInfo
    """Servers of one swarm and their clients have to agree on its fingerprint, which is that of
    `swarmcore.checkpoint.open_checkpoint`."""
    config: Any = None
    """The model's Transformers config, by which adapters in PEFT's format are read; None where the back end
    takes no adapters."""

    @abstractmethod
    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        """Find the model and read what is needed to know its blocks, not yet their weights.

        Raise `ModelNotFoundError`, `CheckpointError`, `UnsupportedModelError` for one that this back end does
        not run, `InputError` for a dtype or device that it does not have.
        """

    @abstractmethod
    def needs(self) -> BlockNeeds:
        """What one block takes of the memory that `free_memory` is about."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that could be taken on the device now."""

    @abstractmethod
    def load(self, span: Span, *, progress: Progress | None = None) -> BlockExecutor:
        """Load blocks ``span``, which the model has. Raises as the constructor does."""

    def speed_key(self) -> Mapping[str, str]:
        """What the speed of loaded blocks depends on besides the model and the name of the back end.

        A speed that was measured under an equal key is taken for this one.
        """
        return {}


def loader_class(executor: str | type[BlockLoader]) -> type[BlockLoader]:
    """The back end of that name, or the one passed in.

    Raise `InputError` when no such back end is installed, `MissingExtraError` when it needs a library that is
    not there.
    """
    found = EXECUTORS.load(executor) if isinstance(executor, str) else executor
    if not (isinstance(found, type) and issubclass(found, BlockLoader)):
        raise InputError(f"executor {executor!r} is not a BlockLoader subclass")
    return found

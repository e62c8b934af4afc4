"""What an executor's entry point names: a `BlockLoader`, which opens a model and loads blocks of it."""

from __future__ import annotations

import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import attrs

from swarmcore.errors import InputError
from swarmcore.executor.base import BlockExecutor
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.plugins import PluginGroup
from swarmcore.types import ModelInfo, Progress, Span

EXECUTORS = PluginGroup("executor", "swarmcore.executors", extras={"torch": "torch", "ggml": "ggml"})
"""The installed back ends; each entry point is a `BlockLoader` subclass."""


_CUDA = re.compile(r"cuda(:\d+)?")
"""Devices by torch's names; those of llama.cpp have others."""

AUTO = "auto"
"""In place of an executor, a dtype, a kind of weights: what fits the model, the machine and the rest best."""


@attrs.frozen(kw_only=True)
class LoadSettings:
    """Which model a server loads, on which device, and what its weights and caches are kept in."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = AUTO
    weights: str = AUTO
    """What the blocks' weights are kept in, of `BlockLoader.weight_types`; ``"auto"`` is as the checkpoint
    has them where the back end can, in ``dtype`` else."""
    cache_dtype: str = AUTO
    """What keys and values are cached in, of `BlockLoader.cache_dtypes`."""
    device: str = "cpu"
    threads: int | None = None
    """Compute threads; None for the back end's own choice."""
    batch_tokens: int = 512
    """Most tokens of one batch."""


class BlockLoader(ABC):
    """A model that is opened, of which blocks can be loaded for a server.

    Every method may block (disk, network) and is called in a thread, one at a time.
    """

    weight_types: ClassVar[tuple[str, ...]] = (AUTO,)
    """What `LoadSettings.weights` may be; `open_loader` refuses the rest."""
    cache_dtypes: ClassVar[tuple[str, ...]] = (AUTO,)
    """What `LoadSettings.cache_dtype` may be."""
    model: ModelInfo
    """Servers of one swarm and their clients have to agree on its fingerprint, which is that of
    `swarmcore.checkpoint.open_checkpoint`."""
    config: Any = None
    """The model's Transformers config, by which adapters in PEFT's format are read; None where the back end
    takes no adapters."""
    start_step: int = 1
    """Spans of the model begin at multiples of this many blocks."""

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


THREADS_WORTH = 1.25
"""Half as many threads have to take this many times as long for the whole number to be taken: what a second
thread keeps of a core is lost to event loops, to clients and to other servers on the machine."""


def thread_choices(threads: int) -> tuple[int, ...]:
    """``threads``, half of them, and so on down to one; nothing where that is no choice.

    Fewer can be faster: on few cores, waking threads and waiting for them can cost more than they bring.
    """
    choices = tuple(threads >> halvings for halvings in range(threads.bit_length()))
    return choices if len(choices) > 1 else ()


def processor_name() -> str:
    """What the CPU is, as its maker calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def choose_executor(settings: LoadSettings, *, adapters: bool = False) -> str:
    """What ``"auto"`` stands for: ``"ggml"`` for a GGUF where its library is installed, ``"torch"`` else.

    Also torch where ``adapters`` are to be served, and where weights, caches or a device are asked for that
    only torch has. Nothing large is imported. Raise as `names_gguf`.
    """
    if adapters or _CUDA.fullmatch(settings.device) or "ggml" not in EXECUTORS.installed():
        return "torch"
    if find_spec("llama_cpp") is None:
        return "torch"
    from swarmcore.checkpoint.location import names_gguf  # needs what either extra brings

    if not names_gguf(settings.model):
        return "torch"
    return "torch" if _lacking(loader_class("ggml"), settings) else "ggml"


def open_loader(
    executor: str | type[BlockLoader], settings: LoadSettings, *, progress: Progress | None = None
) -> BlockLoader:
    """Open the model of ``settings`` with a back end. Raise as `loader_class` and the `BlockLoader`; as well
    `InputError` for weights or a dtype of caches that the back end does not have."""
    loader = loader_class(executor)
    if lacking := _lacking(loader, settings):
        name = executor if isinstance(executor, str) else executor.__name__
        raise InputError(f"executor {name} has no {lacking}")
    return loader(settings, progress=progress)


def _lacking(loader: type[BlockLoader], settings: LoadSettings) -> str:
    """What of ``settings`` the back end does not have, and what it has instead; empty if nothing."""
    if settings.weights not in loader.weight_types:
        return f"weights {settings.weights!r}; it has {', '.join(loader.weight_types)}"
    if settings.cache_dtype not in loader.cache_dtypes:
        return f"cache dtype {settings.cache_dtype!r}; it has {', '.join(loader.cache_dtypes)}"
    return ""


def loader_class(executor: str | type[BlockLoader]) -> type[BlockLoader]:
    """The back end of that name, or the one passed in.

    Raise `InputError` when no such back end is installed, `MissingExtraError` when it needs a library that is
    not there.
    """
    found = EXECUTORS.load(executor) if isinstance(executor, str) else executor
    if not (isinstance(found, type) and issubclass(found, BlockLoader)):
        raise InputError(f"executor {executor!r} is not a BlockLoader subclass")
    return found

"""From settings to blocks in memory: opens the model, plans how many blocks fit, loads them.

Everything here blocks (disk, network): call it in a thread. The executor's libraries are imported here at the
earliest, after the caller has set the environment that they read.
"""

from __future__ import annotations

import logging
from typing import Any

from swarmcore.distribution import version
from swarmcore.errors import AdapterError, SpanError, UnsupportedModelError
from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.loader import AUTO, BlockLoader, LoadSettings, choose_executor, open_loader
from swarmcore.imports import import_large
from swarmcore.placement.capacity import DEFAULT_CACHE_TOKENS, CapacityPlan, plan_capacity
from swarmcore.server.adapters import Weights
from swarmcore.server.config import ServerConfig
from swarmcore.server.throughput import SpeedFile
from swarmcore.types import Progress, Span

logger = logging.getLogger(__name__)

MAX_DEFAULT_CACHE_TOKENS = 131_072


def open_model(config: ServerConfig, progress: Progress | None) -> BlockLoader:
    """Find the model; raises as `choose_executor` and `open_loader` do.

    A GGUF that ggml does not run goes to torch, if the choice was left to us.
    """
    settings = LoadSettings(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        weights=config.weights,
        cache_dtype=config.cache_dtype,
        device=config.device,
        threads=config.threads,
        batch_tokens=config.max_batch_tokens,
    )
    executor = config.executor
    if executor == AUTO:
        executor = choose_executor(settings, adapters=bool(config.adapters))
    if executor != "torch":
        try:
            return open_loader(executor, settings, progress=progress)
        except UnsupportedModelError as exc:
            if config.executor != AUTO:
                raise
            logger.warning("executor %s does not run it, torch is taken instead: %s", executor, exc)
    import_large("swarmcore.executor.torch.loader", progress=progress)
    return open_loader("torch", settings, progress=progress)


def plan_blocks(config: ServerConfig, loader: BlockLoader) -> CapacityPlan:
    """How many blocks of the model to hold. Raise `InputError` when not one fits, and for a wrong device."""
    return plan_capacity(
        loader.needs(),
        memory_free=loader.free_memory(),
        most=config.memory,
        blocks=loader.model.blocks,
        cache_tokens=config.cache_tokens,
        wanted=len(config.span) if config.span else config.num_blocks,
    )


def memory_left(plan: CapacityPlan, executor: BlockExecutor, loader: BlockLoader) -> int:
    """Bytes for caches and activations now that the weights are in memory.

    Weights that the operating system reads from their file as they are needed still count as free there; by
    the plan they do not.
    """
    free, planned = loader.free_memory(), plan.room(len(executor.span))
    return min(free, planned) if planned else free  # more blocks than seemed to fit, as the user wants


def default_cache_tokens(executor: BlockExecutor, memory: int) -> int:
    """A quarter of the ``memory`` that is left, or what was planned for."""
    room = memory // executor.cache_bytes_per_token
    tokens = max(room // 4, min(DEFAULT_CACHE_TOKENS, room * 3 // 4))
    return max(executor.page, min(tokens, MAX_DEFAULT_CACHE_TOKENS))


def read_adapter(folder: str, config: Any, span: Span) -> Weights:
    """The weights of an adapter in PEFT's format for the blocks ``span`` of a model with this ``config``.

    Raise `AdapterError` when it does not fit, and where the executor takes no adapters (no config).
    """
    if config is None:
        raise AdapterError(f"{folder}: this server's executor takes no adapters")
    from swarmcore.executor.torch.wire_tensors import to_wire
    from swarmcore.training.peft_format import read_adapter as read

    tensors, scaling = read(folder, span, config)
    return Weights([to_wire(name, values) for name, values in tensors.items()], scaling)


def speed_file(loader: BlockLoader) -> SpeedFile:
    """Where the measured speed of this model's blocks on this device is kept."""
    from swarmcore.checkpoint import cache_folder

    key = {
        "model": loader.model.fingerprint,
        "executor": f"{type(loader).__module__}.{type(loader).__qualname__}",
        "swarmcore": version(),
        **loader.speed_key(),
    }
    return SpeedFile(cache_folder() / "speed", key)


def check_span(span: Span, blocks: int, name: str) -> None:
    """Raise `SpanError` when the model does not have these blocks."""
    if span.end > blocks:
        raise SpanError(f"{name} has {blocks} blocks, 0:{blocks}; it has no blocks {span}")

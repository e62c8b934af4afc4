"""From settings to blocks in memory: opens the model, plans how many blocks fit, loads them.

Everything here blocks (disk, network): call it in a thread. torch is imported here at the earliest, after the
caller has set the environment that it reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmcore.distribution import version
from swarmcore.errors import SpanError
from swarmcore.executor.base import BlockExecutor
from swarmcore.imports import import_large
from swarmcore.placement.capacity import DEFAULT_CACHE_TOKENS, CapacityPlan, plan_capacity
from swarmcore.server.adapters import Weights
from swarmcore.server.config import ServerConfig
from swarmcore.server.speed_file import SpeedFile
from swarmcore.types import Span

if TYPE_CHECKING:
    from swarmcore.executor.torch.checkpoint import Checkpoint, Progress

MAX_DEFAULT_CACHE_TOKENS = 131_072


def open_model(config: ServerConfig, progress: Progress | None) -> Checkpoint:
    """Find the model; raises as `open_checkpoint` does."""
    import_large("swarmcore.executor.torch.checkpoint")
    from swarmcore.executor.torch.checkpoint import open_checkpoint

    return open_checkpoint(config.model, revision=config.revision, progress=progress)


def plan_blocks(config: ServerConfig, checkpoint: Checkpoint) -> CapacityPlan:
    """How many blocks of the model to hold. Raise `InputError` when not one fits, and for a wrong device."""
    from swarmcore.executor.torch.sizing import block_needs, free_memory

    needs = block_needs(
        checkpoint, dtype=config.dtype, device=config.device, batch_tokens=config.max_batch_tokens
    )
    return plan_capacity(
        needs,
        memory_free=free_memory(config.device),
        blocks=checkpoint.info.blocks,
        cache_tokens=config.cache_tokens,
        wanted=len(config.span) if config.span else config.num_blocks,
    )


def load_blocks(
    config: ServerConfig, checkpoint: Checkpoint, span: Span, progress: Progress | None
) -> BlockExecutor:
    """Load blocks ``span``; raises as `TorchExecutor.load` does."""
    import_large("swarmcore.executor.torch.executor")
    from swarmcore.executor.torch.executor import TorchExecutor

    return TorchExecutor.load(
        checkpoint,
        span,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        progress=progress,
    )


def default_cache_tokens(executor: BlockExecutor, device: str) -> int:
    """A quarter of the memory that is free now that the weights are in it, or what was planned for."""
    from swarmcore.executor.torch.sizing import free_memory

    room = free_memory(device) // executor.cache_bytes_per_token
    tokens = max(room // 4, min(DEFAULT_CACHE_TOKENS, room * 3 // 4))
    return max(executor.page, min(tokens, MAX_DEFAULT_CACHE_TOKENS))


def default_activation_budget(device: str) -> int:
    """Bytes for activations: a fifth of the memory that is free now."""
    from swarmcore.executor.torch.sizing import free_memory

    return free_memory(device) // 5


def default_kept_budget() -> int:
    """Bytes for what sessions keep beside the cache: a tenth of the memory that is free now."""
    from swarmcore.executor.torch.sizing import free_memory

    return free_memory("cpu") // 10


def read_adapter(folder: str, checkpoint: Checkpoint, span: Span) -> Weights:
    """The weights of an adapter in PEFT's format for the blocks ``span``. Raise `AdapterError`."""
    from swarmcore.executor.torch.tensors import to_wire
    from swarmcore.training.peft_format import read_adapter as read

    tensors, scaling = read(folder, span, checkpoint.config)
    return Weights([to_wire(name, values) for name, values in tensors.items()], scaling)


def speed_file(config: ServerConfig, checkpoint: Checkpoint) -> SpeedFile:
    """Where the measured speed of this model's blocks on this device is kept."""
    import torch

    from swarmcore.executor.torch.checkpoint import cache_folder
    from swarmcore.executor.torch.device import DTYPE_NAMES, choose_dtype, parse_device
    from swarmcore.executor.torch.sizing import device_name

    text = checkpoint.config.get_text_config(decoder=True)
    key = {
        "model": checkpoint.info.fingerprint,
        "dtype": DTYPE_NAMES[choose_dtype(config.dtype, text, parse_device(config.device))],
        "device": device_name(config.device),
        "threads": str(config.threads or f"best of {torch.get_num_threads()}"),
        "swarmcore": version(),
        "torch": str(torch.__version__),
    }
    return SpeedFile(cache_folder() / "speed", key)


def check_span(span: Span, blocks: int, name: str) -> None:
    """Raise `SpanError` when the model does not have these blocks."""
    if span.end > blocks:
        raise SpanError(f"{name} has {blocks} blocks, 0:{blocks}; it has no blocks {span}")

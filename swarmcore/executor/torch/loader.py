"""The torch back end, as servers load it; and what blocks would need of a machine, before any is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.executor.loader import AUTO, BlockLoader, LoadSettings, processor_name
from swarmcore.executor.torch.cache_pages import CACHE_DTYPES, parse_cache_dtype
from swarmcore.executor.torch.device import DTYPE_NAMES, DTYPES, Precision, choose_precision, parse_device
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.partial_model import build_on_meta, find_base, layer_list, whole_config
from swarmcore.executor.torch.quantized_layers import quantized_nbytes
from swarmcore.executor.torch.quantized_matrix import WEIGHT_TYPES
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.resources import limits
from swarmcore.types import Progress, Span

log = logging.getLogger(__name__)


class TorchLoader(BlockLoader):
    """Blocks of a checkpoint, run by torch. Back ends that read the same checkpoints may subclass it."""

    weight_types = WEIGHT_TYPES
    cache_dtypes = CACHE_DTYPES

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        self.settings = settings
        self.checkpoint = open_checkpoint(settings.model, revision=settings.revision, progress=progress)
        self.model = self.checkpoint.info
        self.config = self.checkpoint.config

    def needs(self) -> BlockNeeds:
        settings = self.settings
        return block_needs(
            self.checkpoint,
            dtype=settings.dtype,
            weights=settings.weights,
            device=settings.device,
            batch_tokens=settings.batch_tokens,
            cache_dtype=settings.cache_dtype,
        )

    def free_memory(self) -> int:
        return free_memory(self.settings.device)

    def load(self, span: Span, *, progress: Progress | None = None) -> TorchExecutor:
        settings, stored, how = self.settings, self.checkpoint.stored_weights, self._precision()
        if settings.weights == AUTO and stored is not None and how.weights is None:
            log.warning(
                "%s has its weights in %s, for which torch has no kernel here: they are kept in %s, which "
                "takes more memory; --weights with one of %s takes less",
                self.checkpoint.name,
                stored,
                DTYPE_NAMES[how.dtype],
                ", ".join(kind for kind in WEIGHT_TYPES if kind != "bf16"),
            )
        return TorchExecutor.load(
            self.checkpoint,
            span,
            dtype=settings.dtype,
            weights=settings.weights,
            cache_dtype=settings.cache_dtype,
            device=settings.device,
            threads=settings.threads,
            progress=progress,
        )

    def speed_key(self) -> Mapping[str, str]:
        settings, how = self.settings, self._precision()
        return {
            "dtype": DTYPE_NAMES[how.dtype],
            **({"weights": how.weights} if how.weights else {}),
            **({"cache": "int8"} if parse_cache_dtype(settings.cache_dtype) else {}),
            "device": device_name(settings.device),
            "threads": str(settings.threads or f"best of {torch.get_num_threads()}"),
            "torch": str(torch.__version__),
        }

    def _precision(self) -> Precision:
        settings = self.settings
        return choose_precision(
            self.checkpoint, dtype=settings.dtype, weights=settings.weights, device=settings.device
        )


def block_needs(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: str,
    batch_tokens: int,
    weights: str = "auto",
    cache_dtype: str = "auto",
) -> BlockNeeds:
    """Memory for one block of the model in ``dtype`` on ``device``, with batches of ``batch_tokens``.

    Weights are counted exactly (quantised ones on the high side, by less than a tenth); cache and backward
    pass are estimates, on the high side. Raise `InputError` for an unknown dtype, device, kind of weights or
    of cache, `UnsupportedModelError` when transformers cannot build the blocks.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    how = choose_precision(checkpoint, dtype=dtype, weights=weights, device=device)
    parameters, plain, largest = _largest_block(config, how)
    kept = getattr(config, "dtype", None) or torch.float32
    if isinstance(kept, str):
        kept = DTYPES.get(kept.removeprefix("torch."), torch.float32)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    one_by_one = bool(how.weights or checkpoint.stored_weights)
    on_cpu = how.device.type == "cpu"  # on a GPU the checkpoint's bytes pass through the memory of the host
    reading = parameters * kept.itemsize
    return BlockNeeds(
        weights=largest,
        cache_per_token=_cached_bytes(config, None if parse_cache_dtype(cache_dtype) else how.dtype),
        backward=batch_tokens * (8 * hidden + 3 * inner) * how.dtype.itemsize,
        reading=reading if on_cpu and not one_by_one else 0,
        # Plain weights: of a block that is loaded, and later of one product at a time.
        once=(reading * on_cpu + plain) if one_by_one else 0,
    )


def free_memory(device: str) -> int:
    """Bytes that could be taken on ``device`` now."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(parse_device(device))
        return int(free)
    return limits.free_memory()


def device_name(device: str) -> str:
    """What the device is, as its maker calls it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(parse_device(device))
    return processor_name()


def _largest_block(config: Any, how: Precision) -> tuple[int, int, int]:
    """Of the largest block its parameters, their bytes when plain and as they are kept.

    In some families not all blocks are alike.
    """
    _, base = find_base(build_on_meta(whole_config(config)))
    blocks = getattr(base, layer_list(base))
    sizes = [sum(int(parameter.numel()) for parameter in block.parameters()) for block in blocks]
    most = max(sizes)
    plain = most * how.dtype.itemsize
    if how.weights is None:
        return most, plain, plain
    return most, plain, quantized_nbytes(blocks[sizes.index(most)], how.weights, how.dtype)


def _cached_bytes(config: Any, dtype: torch.dtype | None) -> int:
    """Memory of a token in the block that keeps most of it: of ``dtype``, or of int8 with scales."""
    if getattr(config, "is_heterogeneous", False):
        return max(_cached_bytes(layer, dtype) for layer in config.per_layer_config)
    values = _cached_values(config)
    if dtype is not None:
        return values * dtype.itemsize
    return values + 8 * int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _cached_values(config: Any) -> int:
    """Keys and values of one token in one block."""
    heads = config.num_attention_heads
    if rotated := getattr(config, "qk_rope_head_dim", 0):  # latent attention, cached expanded
        return int(heads * (config.qk_nope_head_dim + rotated + config.v_head_dim))
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = 3 if config.model_type == "diffllama" else 2  # it keeps each half of the values for both heads
    return int(pairs * (getattr(config, "num_key_value_heads", None) or heads) * size)

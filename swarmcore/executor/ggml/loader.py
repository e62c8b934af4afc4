"""The ggml back end, as servers load it; and what blocks would need of a machine, before any is loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from swarmcore.checkpoint.gguf_header import TENSOR_TYPES
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.gguf_source import open_gguf
from swarmcore.checkpoint.storage import cache_folder
from swarmcore.errors import CheckpointError, InputError
from swarmcore.executor.ggml.architectures import start_step
from swarmcore.executor.ggml.executor import GgmlExecutor
from swarmcore.executor.ggml.library import library
from swarmcore.executor.ggml.span_cut import cut_span
from swarmcore.executor.ggml.span_model import CACHE_TYPES, ModelSettings
from swarmcore.executor.loader import AUTO, BlockLoader, LoadSettings, processor_name, thread_choices
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.printable import printable_line
from swarmcore.resources import limits
from swarmcore.types import SHORT_DTYPES, Numerics, Progress, Span
from swarmcore.wire.tensors import FLOATS

CACHE_DTYPE = "f16"
"""What llama.cpp itself takes unless it is told."""
_CACHE_BITS = {"f32": 32, "f16": 16, "int8": 9}
"""Of a value, rounded up."""
REPACKED = "repacked"
"""Weights that llama.cpp arranges anew for the processor, where it can for their type: a copy in memory."""


class GgmlLoader(BlockLoader):
    """Blocks of a GGUF, run by llama.cpp."""

    weight_types = (AUTO, REPACKED)
    cache_dtypes = (AUTO, *CACHE_TYPES)

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        """As `BlockLoader`. Also raise `MissingExtraError` where llama-cpp-python is not there, or unfit."""
        self._library = library()
        self.settings = settings
        self._device = self._library.device(settings.device)
        self._dtype = "float32" if settings.dtype == AUTO else settings.dtype
        if self._dtype not in FLOATS:
            raise InputError(f"dtype {settings.dtype!r} is not known; it is auto, {', '.join(FLOATS)}")
        self._repacked = settings.weights == REPACKED
        self._cache_dtype = CACHE_DTYPE if settings.cache_dtype == AUTO else settings.cache_dtype
        self._gguf = open_gguf(settings.model, revision=settings.revision, progress=progress)
        cut_span(self._gguf, Span(0, self._gguf.blocks))  # refused now rather than when it is served
        self.model = self._gguf.info(cache_folder(), progress)
        self.start_step = start_step(self._gguf)

    def needs(self) -> BlockNeeds:
        """Weights are counted exactly, cache on the high side; results and masks of a batch are left out."""
        gguf = self._gguf
        weights = max(gguf.nbytes(gguf.of_block(block)) for block in range(gguf.blocks))
        return BlockNeeds(
            weights=weights,
            reading=weights if self._repacked else 0,
            cache_per_token=_cached_values(gguf) * _CACHE_BITS[self._cache_dtype] // 8,
        )

    def free_memory(self) -> int:
        if self._device.handle is not None:
            return self._library.free_memory(self._device)
        return limits.free_memory()

    def load(self, span: Span, *, progress: Progress | None = None) -> GgmlExecutor:
        threads = self.settings.threads or usual_threads()
        return GgmlExecutor(
            self.model,
            self._gguf,
            span,
            ModelSettings(
                device=self._device,
                threads=threads,
                cache_dtype=self._cache_dtype,
                repacked=self._repacked,
                batch_tokens=self.settings.batch_tokens,
            ),
            dtype=self._dtype,
            numerics=Numerics(
                "ggml",
                weights=_main_type(self._gguf) + (f"+{REPACKED}" if self._repacked else ""),
                dtype=SHORT_DTYPES[self._dtype],
                cache_dtype=self._cache_dtype,
            ),
            thread_choices=thread_choices(threads) if self.settings.threads is None else (),
            progress=progress,
        )

    def speed_key(self) -> Mapping[str, str]:
        return {
            "device": self._device.description if self._device.handle else processor_name(),
            "threads": str(self.settings.threads or f"best of {usual_threads()}"),
            "cache": self._cache_dtype,
            "weights": self.settings.weights,
            "llama-cpp-python": self._library.version,
        }


def usual_threads() -> int:
    """Threads to compute with when nobody says: what OpenMP is told, or all processors of this process."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told):
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _main_type(gguf: GgufModel) -> str:
    """The type that most of the weights in blocks are of."""
    sizes: Counter[str] = Counter()
    for block in range(gguf.blocks):
        for name in gguf.of_block(block):
            tensor = gguf.places[name].tensor
            sizes[TENSOR_TYPES[tensor.type].name.lower()] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _cached_values(gguf: GgufModel) -> int:
    """Keys and values of one token in one block, the one with most of them; of latent attention, too many."""
    heads = _most(gguf, "attention.head_count", 1)
    kv_heads = _most(gguf, "attention.head_count_kv", heads) or heads
    size = gguf.width // max(1, heads)
    return kv_heads * sum(_most(gguf, f"attention.{what}_length", size) for what in ("key", "value"))


def _most(gguf: GgufModel, key: str, default: int) -> int:
    """The number under ``key``, or the largest of those of the blocks."""
    found = gguf.own(key, default)
    numbers = found if isinstance(found, list) else [found]
    if not numbers or not all(isinstance(each, int) and each >= 0 for each in numbers):
        shown = printable_line(repr(found)[:80])
        raise CheckpointError(f"{gguf.name} is damaged: its {gguf.architecture}.{key} is {shown}")
    return int(max(numbers))

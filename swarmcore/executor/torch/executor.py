"""The torch backend: one span of one model, computed in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import attrs
import torch

import swarmcore.executor.torch.codecs  # registers the int8 codec
import swarmcore.executor.torch.sparse_codecs  # noqa: F401  registers the topk and mixed codecs
from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import InternalError, InvalidBatchError, InvalidStepError, SwarmError
from swarmcore.executor.base import (
    Adapter,
    BlockExecutor,
    ForwardPass,
    ScheduledChunk,
    SequenceId,
    SpanChange,
    TrainingBatch,
)
from swarmcore.executor.loader import thread_choices
from swarmcore.executor.torch.adapters import TorchAdapter, check_description, make_adapter, own_adapter
from swarmcore.executor.torch.cache_pages import PAGE, parse_cache_dtype
from swarmcore.executor.torch.device import (
    DTYPE_NAMES,
    choose_precision,
    memory_errors,
)
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.lora import Hooks
from swarmcore.executor.torch.sequence_caches import SequenceCaches
from swarmcore.executor.torch.span import SpanModel, load_span
from swarmcore.executor.torch.step_runner import StepRunner
from swarmcore.executor.torch.training_passes import (
    ComputeThread,
    TorchBackward,
    TorchForward,
    Unit,
    check_rows,
)
from swarmcore.types import ADAPTERS, SHORT_DTYPES, TRAINING, ModelInfo, Numerics, Progress, Span
from swarmcore.wire.tensors import Tensor

MAX_PREFIX_TOKENS = 4096
"""Positions that an adapter may put before every sequence."""

Loader = Callable[[Span, Progress | None], SpanModel]
"""Loads blocks of the executor's model, in its dtype, on its device. Blocks; runs in a thread."""

DECODE_TOKENS = 32
"""Steps of at most this many tokens are computed with the threads that are best for one token."""

P = ParamSpec("P")
R = TypeVar("R")


class TorchExecutor(BlockExecutor):
    """Runs a span with torch, on the CPU or one GPU."""

    computes_padding = True
    prefix_sharing = "pages"
    capabilities = frozenset({TRAINING, ADAPTERS})

    def __init__(
        self, model: ModelInfo, span_model: SpanModel, load: Loader, *, threads: int | None = None
    ) -> None:
        """``load`` gives more blocks when the span changes, with the same layout of caches.

        ``threads`` is how many threads torch may use for one operation; None leaves it to `use_threads`, and
        to torch before that.
        """
        layout = span_model.layout
        self.model = model
        self.span = span_model.span
        self.dtype = DTYPE_NAMES[layout.dtype]
        short = SHORT_DTYPES[self.dtype]
        self.numerics = Numerics(
            "torch",
            weights=span_model.weights or short,
            dtype=short,
            cache_dtype="int8" if layout.quantised else short,
        )
        self.cache_bytes_per_token = layout.bytes_per_token
        self.page = PAGE
        self.max_positions = span_model.max_positions
        """Longest sequence that this model's rotary embedding allows here; None: no limit of that kind."""
        self._device, self._dtype = layout.device, layout.dtype
        self._loaded: LoadedBlocks | None = LoadedBlocks([span_model])
        self._load = load
        self._span_change = SpanChange(self.model)
        self._sequences = SequenceCaches()
        self._hooks = Hooks()
        self._threads = threads or torch.get_num_threads()
        self._decode_threads = self._forward_threads = self._threads
        if threads is None and self._device.type == "cpu":
            self.thread_choices = thread_choices(self._threads)
        self._steps = StepRunner(model, layout, self._sequences, self._hooks, self.max_positions)
        self._thread = ComputeThread(self._run_unit, self._later, self._device, self._dtype)
        self._compute = ThreadPoolExecutor(
            1, "swarmcore-compute", initializer=torch.set_num_threads, initargs=(self._threads,)
        )
        # One thread of torch's only, so that the steps that go on meanwhile are hardly slowed down.
        self._loading = ThreadPoolExecutor(
            1, "swarmcore-load", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._adapting = ThreadPoolExecutor(
            1, "swarmcore-adapters", initializer=torch.set_num_threads, initargs=(1,)
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        span: Span,
        *,
        dtype: str = "auto",
        weights: str = "auto",
        cache_dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> TorchExecutor:
        """Load blocks ``span`` of a checkpoint. Blocks: call it in a thread.

        ``weights`` is of `quantized_matrix.WEIGHT_TYPES`, ``cache_dtype`` of `CACHE_DTYPES`. Raise
        `InputError` for an unknown dtype or device and for weights that the device cannot have, and what
        `load_span` raises.
        """
        quantised = parse_cache_dtype(cache_dtype)
        how = choose_precision(checkpoint, dtype=dtype, weights=weights, device=device)

        def load(part: Span, progress: Progress | None) -> SpanModel:
            model = load_span(
                checkpoint, part, dtype=how.dtype, device=how.device, weights=how.weights, progress=progress
            )
            model.layout = attrs.evolve(model.layout, quantised=quantised)
            return model

        return cls(checkpoint.info, load(span, progress), load, threads=threads)

    def __repr__(self) -> str:
        state = "closed" if self._loaded is None else f"{len(self._sequences)} sequences"
        return f"<TorchExecutor {self.model.name} {self.span} {self.dtype} on {self._device} · {state}>"

    @property
    def cache_bytes_held(self) -> int:
        """Memory that attention caches take now. What sequences share is counted once."""
        return self._sequences.pool.nbytes

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`. The chunks of one batch may belong to one sequence, in order."""
        return await self._in_compute_thread(self._step, batch)

    def use_threads(self, decode: int, forward: int) -> None:
        self._decode_threads, self._forward_threads = decode, forward

    async def encode(self, tensor: Tensor, codec: str) -> Tensor:
        return await self._in_compute_thread(tensor.encode, codec)

    async def decode(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.codec == "raw" else await self._in_compute_thread(tensor.decode)

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> Adapter:
        """As `BlockExecutor.load_adapter`: prefixes, and low-rank updates of the blocks' linear layers."""
        # A thread of its own: large ones take a while to look through, and no step should wait for that.
        return await asyncio.get_running_loop().run_in_executor(
            self._adapting, self._load_adapter, tensors, scaling
        )

    def check_adapter(self, name: str, dtype: str, shape: tuple[int, ...], span: Span) -> None:
        most = self.max_positions or MAX_PREFIX_TOKENS
        check_description(name, dtype, shape, span, self._blocks(), min(most, MAX_PREFIX_TOKENS))

    def _load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> Adapter:
        return make_adapter(tensors, scaling, self._blocks(), self._dtype, self._device)

    def forward(self, batch: TrainingBatch, *, keep: bool = False) -> TorchForward:
        """As `BlockExecutor.forward`. What is kept includes the blocks that it went through."""
        return TorchForward(self._thread, batch, self._check_batch(batch), keep=keep)

    def backward(
        self,
        batch: TrainingBatch,
        gradients: Tensor,
        *,
        kept: ForwardPass | None = None,
        inputs: bool = True,
        weights: bool = False,
    ) -> TorchBackward:
        """As `BlockExecutor.backward`. Holds the graph of the sequences of one unit, through all blocks."""
        adapter = self._check_batch(batch, kept is not None)
        check_rows(gradients, "gradients of the outputs", batch.tokens, self.model.hidden_size)
        if weights and adapter is None:
            raise InvalidBatchError("gradients of an adapter's weights are wanted, and there is no adapter")
        if kept is not None and not isinstance(kept, TorchForward):
            raise InternalError(f"{kept!r} is no pass of this executor")
        return TorchBackward(self._thread, batch, adapter, gradients, kept, inputs=inputs, weights=weights)

    def _check_batch(self, batch: TrainingBatch, without_inputs: bool = False) -> TorchAdapter | None:
        """The batch's adapter, once it is clear that both fit the blocks."""
        self._blocks().check(batch.span)
        if not batch.lengths or min(batch.lengths) < 1:
            raise InvalidBatchError("the batch has an empty sequence, or none; leave out what is empty")
        if not without_inputs:
            check_rows(batch.hidden, "inputs", batch.tokens, self.model.hidden_size)
        adapter = own_adapter(batch.adapter, batch.span)
        try:
            self._steps.check_length(max(batch.lengths) + (adapter.prefix_tokens if adapter else 0))
        except InvalidStepError as exc:
            raise InvalidBatchError(exc.message) from exc
        if batch.padding and adapter is not None and adapter.prefixes:
            raise InvalidBatchError("padding attends to nothing, and so to no prefix of an adapter")
        return adapter

    async def _run_unit(self, unit: Unit, span: Span, adapter: TorchAdapter | None) -> bool:
        return await self._in_compute_thread(self._compute_unit, unit, span, adapter)

    def _compute_unit(self, unit: Unit, span: Span, adapter: TorchAdapter | None) -> bool:
        blocks = self._blocks()
        blocks.check(span)
        self._take_threads(self._forward_threads)
        if adapter is not None:
            self._hooks.install(adapter, blocks)
        return unit(blocks)

    def _later(self, call: Callable[[], None]) -> None:
        """Call it after what the compute thread has to do now."""
        if self._loaded is None:
            call()
        else:
            self._compute.submit(call)

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`. Sequences that go on from one cache share its pages."""
        await self._in_compute_thread(self._reorder, sequences, sources)

    def _reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        with memory_errors("a reordering of caches"):
            self._sequences.reorder(sequences, sources)

    async def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        await self._in_compute_thread(self._share_prefix, source, target, tokens)

    def _share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        with memory_errors("a prefix of a cache"):
            self._sequences.share_prefix(source, target, tokens)

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        return await self._in_compute_thread(self._sequences.export, sequence, start, count)

    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        await self._in_compute_thread(self._import, sequence, span, start, count, tensors, adapter)

    async def change_span(self, span: Span) -> None:
        """As `BlockExecutor.change_span`. Cancelled, it leaves what stays; reading ends soon after."""
        if self._loaded is None:
            raise InternalError("the executor is closed")
        loop = asyncio.get_running_loop()
        with self._span_change.begin(span) as progress:
            # From here on the engine admits no session to blocks that leave.
            self.span = (self._loaded.span and self._loaded.span.overlap(span)) or span
            stays = await self._in_compute_thread(self._keep_only, span)
            loaded = [
                await loop.run_in_executor(self._loading, self._load, part, progress)
                for part in _missing(span, stays)
            ]
            if self._loaded is None:
                raise InternalError("the executor was closed while its span changed")
            self._set_blocks(LoadedBlocks([*self._loaded.models, *loaded]))

    def _keep_only(self, span: Span) -> Span | None:
        """Drop what is not in ``span``; return what is left.

        In the compute thread, so that no step holds on to the others when this returns.
        """
        if self._loaded is None:
            return None
        self._set_blocks(self._loaded.keep(span))
        return self._loaded.span

    def _set_blocks(self, blocks: LoadedBlocks) -> None:
        self._loaded = blocks
        if blocks.span is not None:
            self.span = blocks.span
            self.cache_bytes_per_token = blocks.layout(blocks.span).bytes_per_token

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.reserve`; a smaller reservation gives memory back before the next step."""
        shrunk = self._sequences.reserve(sequence, tokens)
        if shrunk is not None and self._loaded is not None:
            self._compute.submit(self._sequences.trim, shrunk)

    def release(self, sequence: SequenceId) -> None:
        cache = self._sequences.pop(sequence)
        if cache is not None and self._loaded is not None:
            self._compute.submit(self._sequences.release, cache)

    async def close(self) -> None:
        if self._loaded is None:
            return
        self._loaded = None
        self._span_change.give_up()
        self._sequences.clear()
        self._steps.clear()
        await asyncio.to_thread(self._compute.shutdown)
        await asyncio.to_thread(self._loading.shutdown)
        await asyncio.to_thread(self._adapting.shutdown)

    async def _in_compute_thread(self, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        if self._loaded is None:
            raise InternalError("the executor is closed")
        call = partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._compute, call)

    def _import(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None,
    ) -> None:
        blocks = self._loaded
        if blocks is None:
            raise InternalError("the executor was closed before the cache was taken in")
        blocks.check(span)
        own = own_adapter(adapter, span)
        self._steps.check_length(start + count + (own.prefix_tokens if own else 0))
        with memory_errors("a transfer of caches"):
            self._sequences.take_in(sequence, blocks, span, own, start, count, tensors)

    def _step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        if self._loaded is None:
            return [InternalError("the executor was closed before the step was computed") for _ in batch]
        few = sum(part.tokens for part in batch) <= DECODE_TOKENS
        self._take_threads(self._decode_threads if few else self._forward_threads)
        with memory_errors("a step"):
            return self._steps.run(self._loaded, batch, self._threads)

    def _take_threads(self, threads: int) -> None:
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def _blocks(self) -> LoadedBlocks:
        if self._loaded is None:
            raise InternalError("the executor is closed")
        return self._loaded


def _missing(span: Span, stays: Span | None) -> list[Span]:
    """What of ``span`` lies before and after ``stays``."""
    if stays is None:
        return [span]
    parts = Span(span.start, stays.start), Span(stays.end, span.end)
    return [part for part in parts if len(part)]

"""The ggml backend: one span of a GGUF model, computed by llama.cpp in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import attrs

from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.storage import no_progress
from swarmcore.errors import AdapterError, InternalError, SwarmError
from swarmcore.executor.base import Adapter, BlockExecutor, ScheduledChunk, SequenceId, SpanChange
from swarmcore.executor.ggml import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.ggml import kv_transfer
from swarmcore.executor.ggml.architectures import architecture_of, max_positions, sliding_layers
from swarmcore.executor.ggml.library import Library, library
from swarmcore.executor.ggml.sequences import Sequences
from swarmcore.executor.ggml.span_file import SpanFile, span_file
from swarmcore.executor.ggml.span_model import ModelSettings, SpanModel
from swarmcore.executor.ggml.step_runner import StepRunner
from swarmcore.executor.ggml.trial import try_span
from swarmcore.types import ModelInfo, Numerics, Progress, Span
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

PAGE = 64

P = ParamSpec("P")
R = TypeVar("R")


@attrs.define(eq=False)
class _Loaded:
    """A span in llama.cpp, and the file that it is mapped from."""

    span: Span
    model: SpanModel
    file: SpanFile

    def close(self) -> None:
        self.model.close()
        self.file.close()


class GgmlExecutor(BlockExecutor):
    """Runs a span with llama.cpp, on the CPU or one GPU, on the weights of a GGUF as they are."""

    prefix_sharing = "pages"
    caches_whole_span = True

    def __init__(
        self,
        info: ModelInfo,
        model: GgufModel,
        span: Span,
        settings: ModelSettings,
        *,
        dtype: str = "float32",
        numerics: Numerics,
        thread_choices: tuple[int, ...] = (),
        progress: Progress | None = None,
    ) -> None:
        """Load blocks ``span`` of a model. Blocks: call it in a thread.

        ``dtype`` is what results are rounded to; llama.cpp computes in float32 between the products. Raise
        what `span_file` and `SpanModel` raise.
        """
        self.model = info
        self.dtype = dtype
        self.numerics = numerics
        self.page = PAGE
        self.thread_choices = thread_choices
        self._gguf, self._settings = model, settings
        self._threads = settings.threads, settings.threads
        self._library: Library = library()
        loaded = self._load(span, progress)
        self._loaded: _Loaded | None = loaded
        self._closed = False
        self._span_change = SpanChange(info)
        self._set_span(span)
        self.max_sequences = loaded.model.slots
        self._sequences = Sequences(loaded.model.slots)
        self._steps = StepRunner(
            info.hidden_size, dtype, settings.batch_tokens, self._sequences, max_positions(model)
        )
        self._compute = ThreadPoolExecutor(1, "swarmcore-compute")
        self._loading = ThreadPoolExecutor(1, "swarmcore-load")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sequences)} sequences"
        device = self._settings.device.name
        return f"<GgmlExecutor {self.model.name} {self.span} {self.numerics} on {device} · {state}>"

    def _load(self, span: Span, progress: Progress | None) -> _Loaded:
        file = span_file(self._gguf, span, progress=progress)
        try:
            entrance = architecture_of(self._gguf).entrance
            try_span(file.path, self._settings, entrance, progress or no_progress)
            sliding = sliding_layers(self._gguf)
            slides = None if sliding is None else sliding[span.start : span.end]
            model = SpanModel(self._library, file.path, self._settings, entrance, slides)
            return _Loaded(span, model, file)
        except BaseException:
            file.close()
            raise

    def _set_span(self, span: Span) -> None:
        self.span = span
        if self._loaded is not None:
            each = self._loaded.model.bytes_per_token // len(self._loaded.span)
            self.cache_bytes_per_token = each * len(span)

    def use_threads(self, decode: int, forward: int) -> None:
        self._threads = decode, forward

    # --- steps and caches ------------------------------------------------------------------------------

    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`. The chunks of one batch may belong to one sequence, in order."""
        return await self._in_compute_thread(self._step, batch)

    def _step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        loaded = self._tidied()
        loaded.model.use_threads(*self._threads)
        return self._steps.run(loaded.model, loaded.span, batch)

    async def encode(self, tensor: Tensor, codec: str) -> Tensor:
        return await self._in_compute_thread(tensor.encode, codec)

    async def decode(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.codec == "raw" else await self._in_compute_thread(tensor.decode)

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`. Beams have in common what they both hold; nothing is copied."""
        await self._in_compute_thread(self._reorder, sequences, sources)

    def _reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        self._sequences.reorder(self._tidied().model, sequences, sources)

    async def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        await self._in_compute_thread(self._share_prefix, source, target, tokens)

    def _share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        self._sequences.share_prefix(self._tidied().model, source, target, tokens)

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        return await self._in_compute_thread(self._export, sequence, start, count)

    def _export(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        loaded = self._tidied()
        entry = self._sequences.cached(sequence)
        return kv_transfer.export(loaded.model, loaded.span, entry, start, count)

    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        if adapter is not None:
            raise AdapterError("this server's executor takes no adapters")
        await self._in_compute_thread(self._import, sequence, span, start, count, tensors)

    def _import(
        self, sequence: SequenceId, span: Span, start: int, count: int, tensors: Sequence[Tensor]
    ) -> None:
        loaded = self._tidied()
        entry = self._sequences.entry(sequence)
        kv_transfer.take_in(loaded.model, loaded.span, self._sequences, entry, span, start, count, tensors)

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.reserve`; memory is that of all sequences together, and grows with them."""
        if self._sequences.reserve(sequence, tokens) and not self._closed:
            self._compute.submit(self._tidy)

    def release(self, sequence: SequenceId) -> None:
        if self._sequences.release(sequence) and not self._closed:
            self._compute.submit(self._tidy)

    # --- the span --------------------------------------------------------------------------------------

    async def change_span(self, span: Span) -> None:
        """As `BlockExecutor.change_span`, but for the order: what stays is served out of the old span until
        the new one is loaded as a whole. Weights that are mapped take no memory twice on a CPU.

        Where llama.cpp's cache cannot be looked into, sequences are lost, and rebuilt by clients.
        """
        if self._closed:
            raise InternalError("the executor is closed")
        with self._span_change.begin(span) as progress:
            stays = self.span.overlap(span) if self._loaded is not None else None
            # From here on the engine admits no session to blocks that leave.
            self._set_span(stays or span)
            if stays is None:
                await self._in_compute_thread(self._drop)
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._loading, self._load, span, progress)
            try:
                loaded = await asyncio.shield(loading)
            except asyncio.CancelledError:
                loading.add_done_callback(_close_unused)
                raise
            await self._in_compute_thread(self._go_over_to, loaded)

    def _drop(self) -> None:
        if self._loaded is not None:
            self._sequences.lose_all()
            self._loaded.close()
            self._loaded = None

    def _go_over_to(self, loaded: _Loaded) -> None:
        old = self._loaded
        try:
            if self._closed:
                raise InternalError("the executor was closed while its span changed")
            if old is not None:
                self._sequences.tidy(old.model)
                if not kv_transfer.move_all(old.model, old.span, loaded.model, loaded.span):
                    self._sequences.lose_all()
        except BaseException:
            loaded.close()
            raise
        self._loaded = loaded
        self._set_span(loaded.span)
        if old is not None:
            old.close()

    # --- the compute thread ----------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Between steps, with nobody who waits for it."""
        try:
            if self._loaded is not None:
                self._sequences.tidy(self._loaded.model)
        except Exception:
            logger.exception("the caches of released sequences could not be tidied up")

    def _tidied(self) -> _Loaded:
        """What is loaded, without the caches of sequences that were released."""
        if self._loaded is None:
            raise InternalError("the executor is closed, or holds no blocks")
        self._sequences.tidy(self._loaded.model)
        return self._loaded

    async def _in_compute_thread(self, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        if self._closed:
            raise InternalError("the executor is closed")
        call = partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._compute, call)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._span_change.give_up()
        await asyncio.to_thread(self._loading.shutdown)
        self._compute.submit(self._drop)
        await asyncio.to_thread(self._compute.shutdown)
        self._sequences.clear()


def _close_unused(loading: asyncio.Future[_Loaded]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()

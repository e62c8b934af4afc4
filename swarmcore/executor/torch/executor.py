"""The torch backend: one span of one model, computed in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import attrs
import torch

import swarmcore.executor.torch.codecs  # registers the int8 codec
import swarmcore.executor.torch.sparse_codecs  # noqa: F401  registers the topk and mixed codecs
from swarmcore.errors import InternalError, InvalidStepError, SpanError, SwarmError
from swarmcore.executor.base import BlockExecutor, SequenceId, Slice
from swarmcore.executor.torch.batch import RaggedBatch
from swarmcore.executor.torch.checkpoint import Checkpoint, Progress
from swarmcore.executor.torch.device import DTYPE_NAMES, choose_dtype, parse_device
from swarmcore.executor.torch.held import HeldBlocks, common
from swarmcore.executor.torch.kv_cache import PAGE, SequenceCache
from swarmcore.executor.torch.sequences import Sequences
from swarmcore.executor.torch.span import SpanModel, load_span
from swarmcore.executor.torch.tensors import to_torch, to_wire
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import Tensor

Loader = Callable[[Span, Progress | None], SpanModel]
"""Loads blocks of the executor's model, in its dtype, on its device. Blocks; runs in a thread."""

P = ParamSpec("P")
R = TypeVar("R")


class TorchExecutor(BlockExecutor):
    """Runs a span with torch, on the CPU or one GPU."""

    def __init__(
        self, model: ModelInfo, span_model: SpanModel, load: Loader, *, threads: int | None = None
    ) -> None:
        """``load`` gives more blocks when the span changes.

        ``threads`` is how many threads torch may use for one operation; None leaves it as it is.
        """
        layout = span_model.layout
        self.model = model
        self.span = span_model.span
        self.dtype = DTYPE_NAMES[layout.dtype]
        self.cache_bytes_per_token = layout.bytes_per_token
        self.page = PAGE
        self.max_positions = span_model.max_positions
        """Longest sequence that this model's rotary embedding allows here; None: no limit of that kind."""
        self._device, self._dtype = layout.device, layout.dtype
        self._held: HeldBlocks | None = HeldBlocks([span_model])
        self._load = load
        self._changing: threading.Event | None = None
        self._sequences = Sequences()
        self._decoded: dict[int, tuple[weakref.ref[Tensor], torch.Tensor]] = {}
        self._threads = threads or torch.get_num_threads()
        self._compute = ThreadPoolExecutor(
            1, "swarmcore-compute", initializer=torch.set_num_threads, initargs=(self._threads,)
        )
        # One thread of torch's only, so that the steps that go on meanwhile are hardly slowed down.
        self._loading = ThreadPoolExecutor(
            1, "swarmcore-load", initializer=torch.set_num_threads, initargs=(1,)
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        span: Span,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> TorchExecutor:
        """Load blocks ``span`` of a checkpoint. Blocks: call it in a thread.

        Raise `InputError` for an unknown dtype or device, and what `load_span` raises.
        """
        place = parse_device(device)
        precision = choose_dtype(dtype, checkpoint.config.get_text_config(decoder=True), place)

        def load(part: Span, progress: Progress | None) -> SpanModel:
            return load_span(checkpoint, part, dtype=precision, device=place, progress=progress)

        return cls(checkpoint.info, load(span, progress), load, threads=threads)

    def __repr__(self) -> str:
        state = "closed" if self._held is None else f"{len(self._sequences)} sequences"
        return f"<TorchExecutor {self.model.name} {self.span} {self.dtype} on {self._device} · {state}>"

    async def step(self, batch: Sequence[Slice]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`. The slices of one batch may belong to one sequence, in order."""
        return await self._in_compute_thread(self._step, batch)

    async def encode(self, tensor: Tensor, codec: str) -> Tensor:
        return await self._in_compute_thread(tensor.encode, codec)

    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`. A cache that several go on with is copied, for all of them but one."""
        await self._in_compute_thread(self._sequences.reorder, sequences, sources)

    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        return await self._in_compute_thread(self._sequences.export, sequence, start, count)

    async def import_cache(
        self, sequence: SequenceId, span: Span, start: int, count: int, tensors: Sequence[Tensor]
    ) -> None:
        await self._in_compute_thread(self._import, sequence, span, start, count, tensors)

    async def change_span(self, span: Span) -> None:
        """As `BlockExecutor.change_span`. Cancelled, it leaves what stays; reading ends soon after."""
        if self._held is None:
            raise InternalError("the executor is closed")
        if self._changing is not None:
            raise InternalError("the span is being changed already")
        if not 0 <= span.start < span.end <= self.model.blocks:
            raise SpanError(
                f"blocks {span} are not in {self.model.name}, which has blocks 0:{self.model.blocks}"
            )
        stop = self._changing = threading.Event()

        def progress(what: str, done: int, total: int) -> None:
            if stop.is_set():
                raise InternalError("loading was given up")

        loop = asyncio.get_running_loop()
        try:
            # From here on the engine admits no session to blocks that leave.
            self.span = common(span, self._held.span) or span
            stays = await self._in_compute_thread(self._keep, span)
            loaded = [
                await loop.run_in_executor(self._loading, self._load, part, progress)
                for part in _missing(span, stays)
            ]
            if self._held is None:
                raise InternalError("the executor was closed while its span changed")
            self._hold(HeldBlocks([*self._held.models, *loaded]))
        finally:
            stop.set()
            self._changing = None

    def _keep(self, span: Span) -> Span | None:
        """Drop what is not in ``span``; return what is left.

        In the compute thread, so that no step holds on to the others when this returns.
        """
        if self._held is None:
            return None
        self._hold(self._held.keep(common(span, self._held.span)))
        return self._held.span

    def _hold(self, blocks: HeldBlocks) -> None:
        self._held = blocks
        if blocks.span is not None:
            self.span = blocks.span
            self.cache_bytes_per_token = blocks.layout(blocks.span).bytes_per_token

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.reserve`; a smaller reservation gives memory back before the next step."""
        shrunk = self._sequences.reserve(sequence, tokens)
        if shrunk is not None and self._held is not None:
            self._compute.submit(_trim, shrunk)

    def release(self, sequence: SequenceId) -> None:
        self._sequences.release(sequence)

    async def close(self) -> None:
        if self._held is None:
            return
        self._held = None
        if self._changing is not None:
            self._changing.set()
        self._sequences.clear()
        self._decoded.clear()
        await asyncio.to_thread(self._compute.shutdown)
        await asyncio.to_thread(self._loading.shutdown)

    async def _in_compute_thread(self, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        if self._held is None:
            raise InternalError("the executor is closed")
        call = partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._compute, call)

    def _import(
        self, sequence: SequenceId, span: Span, start: int, count: int, tensors: Sequence[Tensor]
    ) -> None:
        blocks = self._held
        if blocks is None:
            raise InternalError("the executor was closed before the cache was taken in")
        _check_held(blocks, span)
        self._check_length(start + count)
        self._sequences.take_in(sequence, blocks, span, start, count, tensors)

    @torch.inference_mode()
    def _step(self, batch: Sequence[Slice]) -> list[Tensor | SwarmError]:
        blocks = self._held
        if blocks is None:
            return [InternalError("the executor was closed before the step was computed") for _ in batch]
        results: list[Tensor | SwarmError | None] = [None] * len(batch)
        accepted: list[_Accepted] = []
        pieces: list[tuple[SequenceCache, int, int]] = []
        lengths: dict[SequenceId, int] = {}
        for index, piece in enumerate(batch):
            try:
                rows = self._rows(piece)
                caches = self._place(blocks, piece, lengths)
            except SwarmError as exc:
                results[index] = exc
                continue
            accepted.append(_Accepted(index, piece, rows))
            pieces += [
                (cache, segment.start, segment.count)
                for cache, segment in zip(caches, piece.segments, strict=True)
            ]
        if accepted:
            part = accepted[0].piece.span
            packed = torch.cat([each.rows for each in accepted]) if len(accepted) > 1 else accepted[0].rows
            ragged = RaggedBatch(pieces, self._device, threads=self._threads)
            output = blocks.forward(packed.unsqueeze(0), ragged, part)[0]
            # Blocks add to their input, so this finds what came in as well, and nothing in a row reaches
            # another sequence. It also waits for the GPU: what is handed out has been computed.
            finite = bool(torch.isfinite(output).all())
            counts = [each.piece.tokens for each in accepted]
            for each, rows in zip(accepted, output.split_with_sizes(counts), strict=True):
                results[each.index] = self._result(each, rows, finite)
        return [result or InternalError("a slice was not computed") for result in results]

    def _rows(self, piece: Slice) -> torch.Tensor:
        """The slice's rows, ``[tokens, hidden size]``, in the executor's dtype and on its device."""
        hidden = self._decode(piece)
        last = piece.first_row + piece.tokens
        if hidden.dim() != 2 or hidden.shape[1] != self.model.hidden_size or hidden.shape[0] < last:
            raise InvalidStepError(
                f"hidden states have shape {list(hidden.shape)}; expected [tokens, {self.model.hidden_size}] "
                f"with at least {last} tokens"
            )
        return hidden[piece.first_row : last].to(self._device, self._dtype)

    def _decode(self, piece: Slice) -> torch.Tensor:
        """The whole step's hidden states, decoded once however many slices it is run in."""
        if piece.hidden.codec == "raw":
            return to_torch(piece.hidden)
        key = id(piece.hidden)
        reference, hidden = self._decoded.get(key, (None, None))
        if hidden is None or reference is None or reference() is not piece.hidden:
            hidden = to_torch(piece.hidden)
        self._decoded = {
            at: kept for at, kept in self._decoded.items() if at != key and kept[0]() is not None
        }
        if piece.first_row + piece.tokens < hidden.shape[0]:
            self._decoded[key] = weakref.ref(piece.hidden), hidden
        return hidden

    def _place(self, blocks: HeldBlocks, piece: Slice, lengths: dict[SequenceId, int]) -> list[SequenceCache]:
        """The caches of the slice's segments. ``lengths`` are as the batch so far will leave them."""
        _check_held(blocks, piece.span)
        caches = []
        after = dict(lengths)
        for segment in piece.segments:
            cache = self._sequences.cache(segment.sequence, blocks, piece.span)
            length = after.get(segment.sequence, cache.length)
            if segment.count < 1 or not 0 <= segment.start <= length:
                raise InvalidStepError(
                    f"a step of {segment.count} tokens at position {segment.start} "
                    f"does not continue a sequence of {length} tokens"
                )
            end = segment.start + segment.count
            self._check_length(end)
            after[segment.sequence] = end
            caches.append(cache)
        lengths.update(after)
        return caches

    def _check_length(self, tokens: int) -> None:
        if self.max_positions is not None and tokens > self.max_positions:
            raise InvalidStepError(
                f"a sequence of {tokens} tokens is too long: the rotary embedding of {self.model.name} "
                f"changes past {self.max_positions} tokens, which is not served"
            )

    def _result(self, accepted: _Accepted, rows: torch.Tensor, finite: bool) -> Tensor | SwarmError:
        piece = accepted.piece
        if not finite and not torch.isfinite(rows).all():
            if not torch.isfinite(accepted.rows).all():
                return InvalidStepError(f"hidden states contain values that are not finite in {self.dtype}")
            wider = "" if self.dtype != "float16" else "; bfloat16 or float32 has more range"
            return InvalidStepError(
                f"blocks {self.span} gave values that are not finite in {self.dtype}{wider}"
            )
        if piece.reply == "last":
            ends = torch.tensor([segment.count for segment in piece.segments]).cumsum(0) - 1
            rows = rows[ends.to(rows.device)]
        try:
            return to_wire("hidden", rows, piece.codec)
        except SwarmError as exc:
            return exc


@attrs.frozen
class _Accepted:
    """A slice that is part of the batch: its place among the results, and its rows."""

    index: int
    piece: Slice
    rows: torch.Tensor


def _check_held(blocks: HeldBlocks, span: Span) -> None:
    if not blocks.holds(span):
        raise SpanError(f"blocks {span} are not held here, only {blocks.span or 'none as yet'}")


def _missing(span: Span, stays: Span | None) -> list[Span]:
    """What of ``span`` lies before and after ``stays``."""
    if stays is None:
        return [span]
    parts = Span(span.start, stays.start), Span(stays.end, span.end)
    return [part for part in parts if len(part)]


@torch.inference_mode()
def _trim(cache: SequenceCache) -> None:
    cache.trim()

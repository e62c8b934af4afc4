"""The torch backend: one span of one model, computed in a thread of its own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs
import torch

import swarmcore.executor.torch.codecs  # noqa: F401  registers the int8 codec
from swarmcore.errors import InternalError, InvalidStepError, SessionLostError, SpanError, SwarmError
from swarmcore.executor.base import BlockExecutor, SequenceId, Slice
from swarmcore.executor.torch.batch import RaggedBatch
from swarmcore.executor.torch.checkpoint import Checkpoint, Progress
from swarmcore.executor.torch.device import DTYPE_NAMES, choose_dtype, parse_device
from swarmcore.executor.torch.kv_cache import PAGE, SequenceCache
from swarmcore.executor.torch.span import SpanModel, load_span
from swarmcore.executor.torch.tensors import to_torch, to_wire
from swarmcore.types import ModelInfo, Span
from swarmcore.wire.tensors import Tensor


class TorchExecutor(BlockExecutor):
    """Runs a span with torch, on the CPU or one GPU."""

    def __init__(self, model: ModelInfo, span_model: SpanModel, *, threads: int | None = None) -> None:
        """``threads`` is how many threads torch may use for one operation; None leaves it as it is."""
        layout = span_model.layout
        self.model = model
        self.span = span_model.span
        self.dtype = DTYPE_NAMES[layout.dtype]
        self.cache_bytes_per_token = layout.bytes_per_token
        self.page = PAGE
        self.max_positions = span_model.max_positions
        """Longest sequence that this model's rotary embedding allows here; None: no limit of that kind."""
        self._layout = layout
        self._span_model: SpanModel | None = span_model
        self._sequences: dict[SequenceId, _Sequence] = {}
        self._decoded: dict[int, tuple[weakref.ref[Tensor], torch.Tensor]] = {}
        self._threads = threads or torch.get_num_threads()
        self._compute = ThreadPoolExecutor(
            1, "swarmcore-compute", initializer=torch.set_num_threads, initargs=(self._threads,)
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
        span_model = load_span(checkpoint, span, dtype=precision, device=place, progress=progress)
        return cls(checkpoint.info, span_model, threads=threads)

    def __repr__(self) -> str:
        state = "closed" if self._span_model is None else f"{len(self._sequences)} sequences"
        return (
            f"<TorchExecutor {self.model.name} {self.span} {self.dtype} on {self._layout.device} · {state}>"
        )

    async def step(self, batch: Sequence[Slice]) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`. The slices of one batch may belong to one sequence, in order."""
        if self._span_model is None:
            raise InternalError("the executor is closed")
        return await asyncio.get_running_loop().run_in_executor(self._compute, self._step, batch)

    async def encode(self, tensor: Tensor, codec: str) -> Tensor:
        if self._span_model is None:
            raise InternalError("the executor is closed")
        return await asyncio.get_running_loop().run_in_executor(self._compute, tensor.encode, codec)

    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.reserve`; a smaller reservation gives memory back before the next step."""
        held = self._sequences.setdefault(sequence, _Sequence())
        shrunk, held.reserved = tokens < held.reserved, tokens
        if held.cache is not None:
            held.cache.reserved = tokens
            if shrunk and self._span_model is not None:
                self._compute.submit(_trim, held.cache)

    def release(self, sequence: SequenceId) -> None:
        # A step that is being computed keeps its own reference until it is done.
        self._sequences.pop(sequence, None)

    async def close(self) -> None:
        if self._span_model is None:
            return
        self._span_model = None
        self._sequences.clear()
        self._decoded.clear()
        await asyncio.to_thread(self._compute.shutdown)

    @torch.inference_mode()
    def _step(self, batch: Sequence[Slice]) -> list[Tensor | SwarmError]:
        model = self._span_model
        if model is None:
            return [InternalError("the executor was closed before the step was computed") for _ in batch]
        results: list[Tensor | SwarmError | None] = [None] * len(batch)
        accepted: list[_Accepted] = []
        pieces: list[tuple[SequenceCache, int, int]] = []
        lengths: dict[SequenceId, int] = {}
        for index, piece in enumerate(batch):
            try:
                rows = self._rows(piece)
                caches = self._place(piece, lengths)
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
            ragged = RaggedBatch(
                pieces, self._layout.device, first_layer=part.start - self.span.start, threads=self._threads
            )
            output = model.forward(packed.unsqueeze(0), ragged.position_ids, ragged, part)[0]
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
        return hidden[piece.first_row : last].to(self._layout.device, self._layout.dtype)

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

    def _place(self, piece: Slice, lengths: dict[SequenceId, int]) -> list[SequenceCache]:
        """The caches of the slice's segments. ``lengths`` are as the batch so far will leave them."""
        if not self.span.start <= piece.span.start < piece.span.end <= self.span.end:
            raise SpanError(f"blocks {piece.span} are not held here, only {self.span}")
        caches = []
        after = dict(lengths)
        for segment in piece.segments:
            held = self._sequences.get(segment.sequence)
            if held is None:
                raise SessionLostError(f"sequence {segment.sequence} has been released")
            cache = self._cache(held, piece.span)
            length = after.get(segment.sequence, cache.length)
            if segment.count < 1 or not 0 <= segment.start <= length:
                raise InvalidStepError(
                    f"a step of {segment.count} tokens at position {segment.start} "
                    f"does not continue a sequence of {length} tokens"
                )
            end = segment.start + segment.count
            if self.max_positions is not None and end > self.max_positions:
                raise InvalidStepError(
                    f"a sequence of {end} tokens is too long: the rotary embedding of {self.model.name} "
                    f"changes past {self.max_positions} tokens, which is not served"
                )
            after[segment.sequence] = end
            caches.append(cache)
        lengths.update(after)
        return caches

    def _cache(self, held: _Sequence, span: Span) -> SequenceCache:
        if held.cache is None:
            first = span.start - self.span.start
            held.cache, held.span = SequenceCache(self._layout.part(first, first + len(span))), span
            held.cache.reserved = held.reserved
        elif held.span != span:
            raise InvalidStepError(
                f"a sequence that began in blocks {held.span} cannot go on in blocks {span}"
            )
        return held.cache

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


@attrs.define(eq=False)
class _Sequence:
    """A sequence that has a reservation; its cache is made at its first step, for the blocks of that step."""

    reserved: int = 0
    cache: SequenceCache | None = None
    span: Span | None = None


@torch.inference_mode()
def _trim(cache: SequenceCache) -> None:
    cache.trim()

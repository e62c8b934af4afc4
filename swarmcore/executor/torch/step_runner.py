"""Steps: chunks of many sessions run as one ragged batch, each with its own result or error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import attrs
import torch

from swarmcore.errors import InternalError, InvalidStepError, SwarmError
from swarmcore.executor.base import ScheduledChunk, SequenceId
from swarmcore.executor.torch.adapters import TorchAdapter, own_adapter
from swarmcore.executor.torch.cache_pages import CacheLayout
from swarmcore.executor.torch.device import DTYPE_NAMES
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.lora import Hooks, RowAdapters, StackCache
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.sequence_caches import SequenceCaches
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import ModelInfo
from swarmcore.wire.tensors import Tensor


class StepRunner:
    """Runs in the compute thread; what it remembers from step to step is decoded or stacked tensors."""

    def __init__(
        self,
        model: ModelInfo,
        layout: CacheLayout,
        sequences: SequenceCaches,
        hooks: Hooks,
        max_positions: int | None,
    ) -> None:
        self._model, self._sequences, self._hooks = model, sequences, hooks
        self._device, self._dtype = layout.device, layout.dtype
        self._dtype_name = DTYPE_NAMES[layout.dtype]
        self._max_positions = max_positions
        self._stacks = StackCache(layout.dtype)
        self.decoded: dict[int, tuple[weakref.ref[Tensor], torch.Tensor]] = {}
        """Steps that are run in several chunks, by identity."""

    def clear(self) -> None:
        """Forget what is decoded."""
        self.decoded.clear()

    @torch.inference_mode()
    def run(
        self, blocks: LoadedBlocks, batch: Sequence[ScheduledChunk], threads: int
    ) -> list[Tensor | SwarmError]:
        """As `BlockExecutor.step`; ``threads`` is what this thread has for one operation."""
        results: list[Tensor | SwarmError | None] = [None] * len(batch)
        accepted: list[_Accepted] = []
        segments: list[tuple[SequenceCache, int, int]] = []
        lengths: dict[SequenceId, int] = {}
        for index, chunk in enumerate(batch):
            try:
                rows = self._rows(chunk)
                adapter = own_adapter(chunk.adapter, chunk.span)
                caches = self._place(blocks, chunk, adapter, lengths)
            except SwarmError as exc:
                results[index] = exc
                continue
            accepted.append(_Accepted(index, chunk, adapter, rows))
            segments += [
                (cache, cache.prefix + segment.start, segment.count)
                for cache, segment in zip(caches, chunk.segments, strict=True)
            ]
        if accepted:
            part = accepted[0].chunk.span
            packed = torch.cat([each.rows for each in accepted]) if len(accepted) > 1 else accepted[0].rows
            updates = self._updates(blocks, accepted)
            ragged = RaggedBatch(
                segments, self._device, first_block=part.start, threads=threads, updates=updates
            )
            try:
                output = blocks.forward(packed.unsqueeze(0), ragged, part)[0]
            except Exception:
                _wipe(segments)
                raise
            # Blocks add to their input, so this finds what came in as well, and nothing in a row reaches
            # another sequence. It also waits for the GPU: what is handed out has been computed.
            finite = bool(torch.isfinite(output).all())
            counts = [each.chunk.tokens for each in accepted]
            for each, rows in zip(accepted, output.split_with_sizes(counts), strict=True):
                results[each.index] = self._result(each, rows, finite)
                written, segments = segments[: len(each.chunk.segments)], segments[len(each.chunk.segments) :]
                if not finite and isinstance(results[each.index], SwarmError):
                    _wipe(written)
        return [result or InternalError("a chunk was not computed") for result in results]

    def _updates(self, blocks: LoadedBlocks, accepted: Sequence[_Accepted]) -> RowAdapters | None:
        adapters = {each.adapter for each in accepted if each.adapter is not None and each.adapter.targets}
        if not adapters:
            return None
        for adapter in adapters:
            self._hooks.install(adapter, blocks)
        rows = [(each.adapter if each.adapter in adapters else None, each.chunk.tokens) for each in accepted]
        return RowAdapters(rows, self._stacks.get(adapters))

    def _rows(self, chunk: ScheduledChunk) -> torch.Tensor:
        """The chunk's rows, ``[tokens, hidden size]``, in the executor's dtype and on its device."""
        hidden = to_torch(chunk.hidden) if chunk.hidden.codec == "raw" else self._decoded(chunk)
        last = chunk.first_row + chunk.tokens
        if hidden.dim() != 2 or hidden.shape[1] != self._model.hidden_size or hidden.shape[0] < last:
            raise InvalidStepError(
                f"hidden states have shape {list(hidden.shape)}; expected "
                f"[tokens, {self._model.hidden_size}] with at least {last} tokens"
            )
        return hidden[chunk.first_row : last].to(self._device, self._dtype)

    def _decoded(self, chunk: ScheduledChunk) -> torch.Tensor:
        """The whole step's encoded hidden states, decoded once however many chunks it is run in."""
        key = id(chunk.hidden)
        reference, hidden = self.decoded.get(key, (None, None))
        if hidden is None or reference is None or reference() is not chunk.hidden:
            hidden = to_torch(chunk.hidden)
        self.decoded = {at: kept for at, kept in self.decoded.items() if at != key and kept[0]() is not None}
        if chunk.first_row + chunk.tokens < hidden.shape[0]:
            self.decoded[key] = weakref.ref(chunk.hidden), hidden
        return hidden

    def _place(
        self,
        blocks: LoadedBlocks,
        chunk: ScheduledChunk,
        adapter: TorchAdapter | None,
        lengths: dict[SequenceId, int],
    ) -> list[SequenceCache]:
        """The caches of the chunk's segments. ``lengths`` are as the batch so far will leave them."""
        blocks.check(chunk.span)
        caches = []
        after = dict(lengths)
        for segment in chunk.segments:
            cache = self._sequences.cache(segment.sequence, blocks, chunk.span, adapter)
            length = after.get(segment.sequence, cache.length - cache.prefix)
            if segment.count < 1 or not 0 <= segment.start <= length:
                raise InvalidStepError(
                    f"a step of {segment.count} tokens at position {segment.start} "
                    f"does not continue a sequence of {length} tokens"
                )
            end = segment.start + segment.count
            self.check_length(cache.prefix + end)
            after[segment.sequence] = end
            caches.append(cache)
        lengths.update(after)
        return caches

    def check_length(self, tokens: int) -> None:
        """Raise `InvalidStepError` for a sequence that is too long for the rotary embedding."""
        if self._max_positions is not None and tokens > self._max_positions:
            raise InvalidStepError(
                f"a sequence of {tokens} tokens is too long: the rotary embedding of {self._model.name} "
                f"changes past {self._max_positions} tokens, which is not served"
            )

    def _result(self, accepted: _Accepted, rows: torch.Tensor, finite: bool) -> Tensor | SwarmError:
        chunk = accepted.chunk
        if not finite and not torch.isfinite(rows).all():
            if not torch.isfinite(accepted.rows).all():
                return InvalidStepError(
                    f"hidden states contain values that are not finite in {self._dtype_name}"
                )
            wider = "" if self._dtype_name != "float16" else "; bfloat16 or float32 has more range"
            return InvalidStepError(
                f"blocks {chunk.span} gave values that are not finite in {self._dtype_name}{wider}"
            )
        if chunk.reply == "last":
            ends = torch.tensor([segment.count for segment in chunk.segments]).cumsum(0) - 1
            rows = rows[ends.to(rows.device)]
        elif 2 * rows.nbytes < rows.untyped_storage().nbytes():
            rows = rows.clone()  # who keeps it should not keep the whole batch
        try:
            return to_wire("hidden", rows, chunk.codec)
        except SwarmError as exc:
            return exc


def _wipe(segments: Sequence[tuple[SequenceCache, int, int]]) -> None:
    """Leave nothing of a failed step: later ones read what is behind their last token, with a weight of 0."""
    for cache, start, count in segments:
        cache.wipe(start, start + count)


@attrs.frozen
class _Accepted:
    """A chunk that is part of the batch: its place among the results, and its rows."""

    index: int
    chunk: ScheduledChunk
    adapter: TorchAdapter | None
    rows: torch.Tensor

"""The sequences of an executor and their caches: room, copies for beams, pieces that come and go."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.executor.base import SequenceId
from swarmcore.executor.torch.adapters import TorchAdapter
from swarmcore.executor.torch.device import DTYPE_NAMES
from swarmcore.executor.torch.kv_cache import SequenceCache
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


@attrs.define(eq=False)
class _Sequence:
    """One that has a reservation; its cache is made when first needed, for the blocks it goes through."""

    reserved: int = 0
    cache: SequenceCache | None = None
    span: Span | None = None


class SequenceCaches:
    """`reserve` and `release` are called on the event loop, all else in the compute thread.

    The caller keeps them apart: nothing happens to a sequence while the compute thread works on it.
    """

    def __init__(self) -> None:
        self._sequences: dict[SequenceId, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def clear(self) -> None:
        self._sequences.clear()

    def reserve(self, sequence: SequenceId, tokens: int) -> SequenceCache | None:
        """Room for ``tokens`` tokens; return the cache that has more than that now, to be trimmed."""
        entry = self._sequences.setdefault(sequence, _Sequence())
        shrunk, entry.reserved = tokens < entry.reserved, tokens
        if entry.cache is not None:
            entry.cache.reserved = tokens
        return entry.cache if shrunk else None

    def release(self, sequence: SequenceId) -> None:
        # A step that is being computed keeps its own reference until it is done.
        self._sequences.pop(sequence, None)

    def cache(
        self, sequence: SequenceId, blocks: LoadedBlocks, span: Span, adapter: TorchAdapter | None
    ) -> SequenceCache:
        """The sequence's cache for ``span``, made when there is none; it begins with the adapter's prefix.

        Raise `SessionLostError` for a sequence without a reservation, `InvalidStepError` for a span or a
        length of prefix that it did not begin with.
        """
        entry = self._reserved(sequence)
        entry.cache, entry.span = _cache_for(entry, blocks, span, adapter), span
        return entry.cache

    @torch.inference_mode()
    def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`."""
        entry = [self._reserved(sequence) for sequence in sequences]
        caches = {source: (entry[source].cache, entry[source].span) for source in set(sources)}
        for each in entry:
            each.cache = each.span = None  # frees what nobody goes on with, before anything is copied
        for at, source in sorted(enumerate(sources), key=lambda pair: pair[0] != pair[1]):
            cache, span = caches[source]
            if cache is not None:
                if any(each.cache is cache for each in entry):
                    cache = cache.copy(entry[at].reserved)
                else:
                    cache.reserved = entry[at].reserved
                    cache.trim()
            entry[at].cache, entry[at].span = cache, span

    @torch.inference_mode()
    def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.share_prefix`."""
        cache, new = self._cached(source), self._reserved(target)
        length = cache.length - cache.prefix
        if not 0 < tokens <= length or new.cache is not None:
            raise InvalidStepError(
                f"{tokens} tokens of a cache of {length} cannot begin sequence {target}, or it has begun"
            )
        new.cache, new.span = cache.copy(new.reserved, cache.prefix + tokens), self._sequences[source].span

    @torch.inference_mode()
    def export(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        """As `BlockExecutor.export_cache`."""
        cache = self._cached(sequence)
        if start < 0 or count < 1 or start + count > cache.length - cache.prefix:
            raise InvalidStepError(
                f"tokens {start} to {start + count} are not in a cache of "
                f"{cache.length - cache.prefix} tokens"
            )
        start += cache.prefix
        # Copied even where it is in one piece: the cache goes on to change.
        return tuple(
            to_wire(name, part.to("cpu", copy=True, memory_format=torch.contiguous_format))
            for name, part in cache.tensors(start, start + count).items()
        )

    @torch.inference_mode()
    def take_in(
        self,
        sequence: SequenceId,
        blocks: LoadedBlocks,
        span: Span,
        adapter: TorchAdapter | None,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
    ) -> None:
        """As `BlockExecutor.import_cache`."""
        entry = self._reserved(sequence)
        cache = _cache_for(entry, blocks, span, adapter)
        if not 0 <= start <= cache.length - cache.prefix:
            raise InvalidStepError(
                f"a cache from token {start} on does not continue a sequence of "
                f"{cache.length - cache.prefix} tokens"
            )
        dtype = DTYPE_NAMES[cache.layout.dtype]
        expected = [(name, dtype, shape, "raw") for name, shape in cache.shapes(count).items()]
        given = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
        if given != expected or any(tensor.data.nbytes != tensor.decoded_nbytes for tensor in tensors):
            raise InvalidStepError(
                f"a cache laid out as {given} cannot be taken in; blocks {span} here need {expected}"
            )
        entry.cache, entry.span = cache, span
        start += cache.prefix
        cache.prepare(start, start + count)
        for target, tensor in zip(cache.tensors(start, start + count).values(), tensors, strict=True):
            target.copy_(to_torch(tensor))

    def _cached(self, sequence: SequenceId) -> SequenceCache:
        entry = self._sequences.get(sequence)
        if entry is None or entry.cache is None:
            raise SessionLostError(f"sequence {sequence} has no cache here")
        return entry.cache

    def _reserved(self, sequence: SequenceId) -> _Sequence:
        entry = self._sequences.get(sequence)
        if entry is None:
            raise SessionLostError(f"sequence {sequence} has been released")
        return entry


def _cache_for(
    entry: _Sequence, blocks: LoadedBlocks, span: Span, adapter: TorchAdapter | None
) -> SequenceCache:
    prefix = 0 if adapter is None else adapter.prefix_tokens
    if entry.cache is None:
        cache = SequenceCache(blocks.layout(span))
        cache.reserved = entry.reserved
        if adapter is not None and prefix:
            names = [adapter.prefixes[block] for block in span]
            cache.begin_with([adapter.weights[name] for name in names])
        return cache
    if entry.span != span:
        raise InvalidStepError(f"a sequence that began in blocks {entry.span} cannot go on in blocks {span}")
    if entry.cache.prefix != prefix:
        raise InvalidStepError(
            f"a sequence that began with a prefix of {entry.cache.prefix} tokens cannot go on with one of "
            f"{prefix} tokens"
        )
    return entry.cache

"""The sequences of an executor and their caches: room, copies for beams, pieces that come and go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import torch

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.executor.base import SequenceId
from swarmcore.executor.torch.adapters import TorchAdapter
from swarmcore.executor.torch.cache_pages import Extent, PagePool, pages_of
from swarmcore.executor.torch.kv_cache import Run, SequenceCache
from swarmcore.executor.torch.loaded_blocks import LoadedBlocks
from swarmcore.executor.torch.wire_tensors import WIRE_DTYPES, WIRE_NAMES, to_torch, to_wire
from swarmcore.types import Span
from swarmcore.wire.tensors import Tensor


@attrs.define(eq=False)
class _Sequence:
    """One that has a reservation; its cache is made when first needed, for the blocks it goes through."""

    reserved: int = 0
    cache: SequenceCache | None = None
    span: Span | None = None


class SequenceCaches:
    """`reserve` and `pop` are called on the event loop, all else in the compute thread.

    The caller keeps them apart: nothing happens to a sequence while the compute thread works on it.
    """

    def __init__(self) -> None:
        self._sequences: dict[SequenceId, _Sequence] = {}
        self.pool = PagePool()

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

    def pop(self, sequence: SequenceId) -> SequenceCache | None:
        """Forget the sequence; return its cache, to be released in the compute thread."""
        entry = self._sequences.pop(sequence, None)
        return None if entry is None else entry.cache

    @torch.inference_mode()
    def release(self, cache: SequenceCache) -> None:
        if cache.release():
            self._settle(list(self._sequences.values()))

    @torch.inference_mode()
    def trim(self, cache: SequenceCache) -> None:
        """Give back what lies beyond the cache's reservation."""
        cache.trim()
        if any(not run.writable for run in cache.runs):
            self._settle(list(self._sequences.values()))

    def cache(
        self, sequence: SequenceId, blocks: LoadedBlocks, span: Span, adapter: TorchAdapter | None
    ) -> SequenceCache:
        """The sequence's cache for ``span``, made when there is none; it begins with the adapter's prefix.

        Raise `SessionLostError` for a sequence without a reservation, `InvalidStepError` for a span or a
        length of prefix that it did not begin with.
        """
        entry = self._reserved(sequence)
        entry.cache, entry.span = self._cache_for(entry, blocks, span, adapter), span
        return entry.cache

    @torch.inference_mode()
    def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """As `BlockExecutor.reorder`."""
        entries = [self._reserved(sequence) for sequence in sequences]
        before = [(each.cache, each.span) for each in entries]
        after = []
        for each, source in zip(entries, sources, strict=True):
            cache, span = before[source]
            after.append((None if cache is None else cache.fork(each.reserved), span))
        for cache, _ in before:
            if cache is not None:
                cache.release()
        for each, (cache, span) in zip(entries, after, strict=True):
            each.cache, each.span = cache, span
        self._settle(entries)

    @torch.inference_mode()
    def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        """As `BlockExecutor.share_prefix`."""
        cache, new = self._cached(source), self._reserved(target)
        length = cache.length - cache.prefix
        if not 0 < tokens <= length or new.cache is not None:
            raise InvalidStepError(
                f"{tokens} tokens of a cache of {length} cannot begin sequence {target}, or it has begun"
            )
        new.cache, new.span = cache.fork(new.reserved, cache.prefix + tokens), self._sequences[source].span

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
            to_wire(name, torch.cat(parts, 2).cpu())
            for name, parts in cache.tensors(start, start + count).items()
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
        cache = self._cache_for(entry, blocks, span, adapter)
        try:
            values = _values(cache, span, start, count, tensors)
        except InvalidStepError:
            if cache is not entry.cache:
                cache.release()
            raise
        entry.cache, entry.span = cache, span
        start += cache.prefix
        cache.prepare(start, start + count)
        targets = cache.tensors(start, start + count).values()
        for parts, each in zip(targets, values, strict=True):
            for target, part in zip(
                parts, each.split_with_sizes([part.shape[2] for part in parts], 2), strict=True
            ):
                target.copy_(part)

    def _settle(self, entries: Iterable[_Sequence]) -> None:
        """Give back what none of the sequences that share an extent, or shared it, reads any more."""
        readers: dict[Extent, list[Run]] = {}
        for cache in filter(None, (each.cache for each in entries)):
            cache.trim()
            for run in cache.runs:
                readers.setdefault(run.extent, []).append(run)
        for extent, runs in readers.items():
            read = max(run.tokens for run in runs)
            if extent.references == len(runs) > 1 and extent.capacity > pages_of(read):
                extent.resize(pages_of(read), read)

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
        self, entry: _Sequence, blocks: LoadedBlocks, span: Span, adapter: TorchAdapter | None
    ) -> SequenceCache:
        prefix = 0 if adapter is None else adapter.prefix_tokens
        if entry.cache is None:
            cache = SequenceCache(blocks.layout(span), self.pool)
            cache.reserved = entry.reserved
            if adapter is not None and prefix:
                names = [adapter.prefixes[block] for block in span]
                cache.begin_with([adapter.weights[name] for name in names])
            return cache
        if entry.span != span:
            raise InvalidStepError(
                f"a sequence that began in blocks {entry.span} cannot go on in blocks {span}"
            )
        if entry.cache.prefix != prefix:
            raise InvalidStepError(
                f"a sequence that began with a prefix of {entry.cache.prefix} tokens cannot go on "
                f"with one of {prefix} tokens"
            )
        return entry.cache


def _values(
    cache: SequenceCache, span: Span, start: int, count: int, tensors: Sequence[Tensor]
) -> list[torch.Tensor]:
    """What is to be put into the cache from token ``start`` on, if it may follow there."""
    length = cache.length - cache.prefix
    if not 0 <= start <= length:
        raise InvalidStepError(
            f"a cache from token {start} on does not continue a sequence of {length} tokens"
        )
    shapes = cache.shapes(count)
    expected = [(name, WIRE_NAMES[dtype], shape, "raw") for name, (shape, dtype) in shapes.items()]
    given = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
    if given != expected or any(tensor.data.nbytes != tensor.decoded_nbytes for tensor in tensors):
        raise InvalidStepError(
            f"a cache laid out as {given} cannot be taken in; blocks {span} here need {expected}"
        )
    values = [to_torch(tensor, WIRE_DTYPES) for tensor in tensors]
    if not all(bool(torch.isfinite(each).all()) for each in values):
        raise InvalidStepError("a cache with values that are not finite cannot be taken in")
    return values

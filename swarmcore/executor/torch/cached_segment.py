"""New tokens of one sequence in a batch, and how its cache is read and written for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch

from swarmcore.executor.torch.attention_products import products_pay
from swarmcore.executor.torch.batch import Attention, causal_mask
from swarmcore.executor.torch.cache_pages import Extent, Planes, restored
from swarmcore.executor.torch.kv_cache import SequenceCache

PACKED_ROWS = 64
"""Up to this many query rows, the query heads that share a key head are stacked into rows instead of copying
keys and values for each of them."""

_GATHERED = 512
"""Runs of fewer tokens than this are put together before they are read."""


class CachedSegment:
    """Consecutive new tokens of one sequence: its rows of the batch, and its cache up to the last of them."""

    def __init__(self, cache: SequenceCache, start: int, count: int) -> None:
        """All of the batch's tokens have been made room for."""
        self.start, self.count, self.end = start, count, start + count
        self.runs = [
            (run.extent, run.start, min(run.tokens, self.end - run.start))
            for run in cache.runs
            if run.start < self.end
        ]
        self.slots = list(cache.slots(start, self.end))
        """Where new keys and values go: for each run that takes some, the planes of each layer."""
        self._quantised = cache.layout.quantised
        self._layout = cache.layout
        # Rows behind the last token of a sequence do no harm when they are read; later segments' rows may.
        self._reads_whole = self.end == cache.length and cache.layout.stored is torch.bfloat16
        self._reads_whole &= cache.layout.device.type == "cpu"

    def reading(self, how: Attention, query: torch.Tensor, key_heads: int) -> Reading:
        """How the layers that attend like ``how`` read the cache, ``query`` being that of the whole batch."""
        rows = query.shape[1] // key_heads
        first = how.first_key(self.start)
        length, columns = self.end - first, Columns(self.runs, first, self._reads_whole)
        few = rows * self.count <= PACKED_ROWS
        if query.dtype is torch.float32 and query.device.type == "cpu":
            products = len(self.runs) > 1  # as fast as the fused kernel, which takes nothing in pieces
        else:
            values = query.shape[1] * self.count * query.shape[3]
            products = (columns.whole or self._quantised) and products_pay(query, values * length, rows)
        mask = partial(causal_mask, self.start, self.end, how, query.device, query.dtype)
        if few and (how.explicit or products):
            return Reading(self.start, length, columns.spread(_by_key_heads(mask(), rows)), columns)
        views = make = None
        if len(self.runs) == 1 and not self._quantised:
            views = self.runs[0][0].slots(first, length)
        else:
            make = partial(self._in_one_piece, Columns(self.runs, first, False))
        stacked = _stacked(mask(), rows) if few else None
        return Reading(self.start, length, stacked, None, views, make, functools.cache(mask))

    def _in_one_piece(self, columns: Columns, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        [planes] = columns.pieces(layer, gathered=True)
        keys, values = restored(self._layout, planes)
        return keys.unsqueeze(0), values.unsqueeze(0)


def _by_key_heads(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A `causal_mask` as ``[1 or key heads, 1 or rows, count, keys]``."""
    return mask if mask is None or mask.shape[1] == 1 else mask.view(-1, rows, *mask.shape[2:])


def _stacked(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A `causal_mask` for ``rows`` heads stacked into rows, ``[1, 1 or key heads, rows * count, keys]``."""
    if mask is None or rows == 1:
        return mask
    heads = mask.shape[1]
    if heads == 1:
        return mask.repeat(1, 1, rows, 1)
    return mask.reshape(1, heads // rows, -1, mask.shape[-1])


@attrs.define(eq=False)
class Reading:
    """How the cache of a segment is read: in one piece, by a fused kernel or in blocks, or piece by piece."""

    start: int
    """Position of the segment's first token."""
    length: int
    """Tokens that are read."""
    mask: torch.Tensor | None
    """What is added to the scores of a few rows: over all columns, or stacked where there are none."""
    columns: Columns | None
    """For products, piece by piece."""
    views: list[Planes] | None = None
    """Keys and values of each layer, where they need not be made."""
    make: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
    unstacked_mask: Callable[[], torch.Tensor | None] = lambda: None
    """The `causal_mask`, made when it is first asked for."""

    def one_piece(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, ``[1, heads, tokens, size]``."""
        if self.views is not None:
            keys, values = self.views[layer]
            return keys, values
        assert self.make is not None
        return self.make(layer)


class Columns:
    """The tokens of some runs from one position on, as columns of scores."""

    def __init__(self, runs: Sequence[tuple[Extent, int, int]], first: int, whole: bool) -> None:
        """``runs`` are extents, with the position of the first token and how many there are.

        With ``whole``, extents are read as they lie where most of them is seen: products read a part of one
        more slowly than all of it.
        """
        self.whole = True
        """Whether nothing is read in part."""
        self.unseen: list[tuple[int, int]] = []
        """Columns that are no tokens that count: the first, how many."""
        self._read: list[tuple[Extent, int, int]] = []
        """Of which extent, from which token on, how many."""
        self._seen: list[tuple[int, int]] = []
        """Which columns are tokens that count: the first, how many."""
        self._columns = 0
        for extent, start, tokens in runs:
            low = max(first - start, 0)
            seen = tokens - low
            if seen <= 0:
                continue
            as_it_lies = whole and 2 * seen >= extent.capacity
            if as_it_lies:
                around = (0, low), (tokens, extent.capacity - tokens)
                self.unseen += [(self._columns + at, count) for at, count in around if count]
            self._seen.append((self._columns + (low if as_it_lies else 0), seen))
            self._read.append((extent, 0, extent.capacity) if as_it_lies else (extent, low, seen))
            self._columns += self._read[-1][2]
            self.whole &= as_it_lies

    def pieces(self, layer: int, *, gathered: bool = False) -> list[Planes]:
        """What is read, ``[heads, tokens, size]``: short runs put together, or all of them (``gathered``)."""
        groups: list[list[Planes]] = []
        short = False
        for extent, at, count in self._read:
            planes = extent.layers[layer]
            if count < extent.capacity:
                planes = tuple(plane.narrow(1, at, count) for plane in planes)
            if groups and (gathered or (short and count < _GATHERED)):
                groups[-1].append(planes)
            else:
                groups.append([planes])
            short = count < _GATHERED
        return [
            group[0] if len(group) == 1 else tuple(torch.cat(parts, 1) for parts in zip(*group, strict=True))
            for group in groups
        ]

    def spread(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """``mask``, ``[..., tokens]``, over all columns."""
        if mask is None or not self.unseen:
            return mask
        spread = mask.new_zeros(*mask.shape[:-1], self._columns)
        lengths = [count for _, count in self._seen]
        for part, (first, count) in zip(mask.split_with_sizes(lengths, -1), self._seen, strict=True):
            spread.narrow(-1, first, count).copy_(part)
        return spread

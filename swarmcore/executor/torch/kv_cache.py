"""The attention cache of one sequence: a table of extents, which it may share with others.

Every key is kept, also by layers with a sliding window (they read only the last ones), so that a cache can be
rolled back to any earlier position exactly, by forgetting what lies after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch

from swarmcore.executor.torch.cache_pages import PAGE, CacheLayout, Extent, PagePool, Planes, pages_of, stored


@attrs.define(eq=False)
class Run:
    """Consecutive tokens of a sequence: the first ``tokens`` of an extent."""

    extent: Extent
    start: int
    """Position of the first."""
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def writable(self) -> bool:
        return self.extent.references == 1


class SequenceCache:
    """The cache of one sequence: ``length`` tokens stored, a prefix included.

    All runs but the last are of whole pages. An extent that others read, too, is never written: the run then
    ends with its last whole page, and the tokens after it are copied into an extent of the cache's own (copy
    on write).
    """

    def __init__(self, layout: CacheLayout, pool: PagePool | None = None) -> None:
        self.length = 0
        self.reserved = 0
        """Tokens the cache is to have room for at its next step."""
        self.prefix = 0
        """How many of the tokens were put before the sequence's own, for good."""
        self.layout = layout
        self.runs: list[Run] = []
        self._pool = pool or PagePool()

    def __repr__(self) -> str:
        return f"<SequenceCache {self.length}/{self.capacity} tokens in {len(self.runs)} extents>"

    @property
    def capacity(self) -> int:
        """Tokens that there is room for, if nobody else comes to read them."""
        return self.runs[-1].start + self.runs[-1].extent.capacity if self.runs else 0

    def prepare(self, start: int, end: int) -> None:
        """Roll back to ``start`` and make room up to ``end``; the tokens between count as stored from now on.

        Takes or gives back memory, which invalidates views. ``start`` is at most ``length``.
        """
        self._cut(start)
        self._own_tail()
        self._fit(pages_of(max(self.reserved, end)), end)
        for run in self.runs:
            run.tokens = min(end - run.start, run.extent.capacity) if run.writable else run.tokens
        self.length = end

    def begin_with(self, prefixes: Sequence[torch.Tensor]) -> None:
        """Put keys and values, ``[2, tokens, heads, size]`` for each layer, into a cache that is empty."""
        self.prefix = prefixes[0].shape[1]
        self.prepare(0, self.prefix)
        first = 0
        for slots in self.slots(0, self.prefix):
            count = slots[0][0].shape[2]
            for prefix, planes in zip(prefixes, slots, strict=True):
                pair = prefix[:, first : first + count].transpose(1, 2).to(self.layout.dtype)
                for plane, rows in zip(planes, stored(self.layout, pair[:1], pair[1:]), strict=True):
                    plane.copy_(rows)
            first += count

    def trim(self) -> None:
        """Give back at once what lies beyond the reservation. Not while a batch holds views of this cache."""
        room = pages_of(max(self.reserved, self.prefix))
        if not room:
            self.release()
        else:
            self._trim_runs()
            if room < self.capacity:
                self.length = min(self.length, room)
                self._cut(self.length)
                self._fit(room, self.length)

    def fork(self, reserved: int, tokens: int | None = None) -> SequenceCache:
        """A cache with the same tokens, the first ``tokens`` of them or all, as far as ``reserved`` has room.

        Both share them until one of them writes.
        """
        new = SequenceCache(self.layout, self._pool)
        new.reserved, new.prefix = reserved, self.prefix
        length = self.length if tokens is None else tokens
        new.length = min(length, pages_of(max(reserved, self.prefix)))
        new.runs = [
            Run(run.extent.share(), run.start, min(run.tokens, new.length - run.start))
            for run in self.runs
            if run.start < new.length
        ]
        return new

    def release(self) -> bool:
        """Forget everything; return whether others go on reading some of it."""
        runs, self.runs, self.length = self.runs, [], 0
        shared = any(not run.writable for run in runs)
        for run in runs:
            run.extent.drop()
        return shared

    def slots(self, start: int, end: int) -> Iterator[list[Planes]]:
        """Where the tokens ``start:end`` are kept: for each run, and in it for each layer,
        ``[1, heads, tokens, size]``."""
        for run, at, count in self._pieces(start, end):
            yield run.extent.slots(at, count)

    def wipe(self, start: int, end: int) -> None:
        """Leave nothing of the tokens ``start:end``, which the last step wrote."""
        for run, at, count in self._pieces(start, end):
            run.extent.wipe(at, count)

    def tensors(self, start: int, end: int) -> dict[str, list[torch.Tensor]]:
        """What is kept of the tokens ``start:end``, by name: views ``[layers, heads, tokens, size]``.

        The layers of one shape are together: ``keys.0`` and ``values.0`` are those of the shape that the
        first layer has, and so on.
        """
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.shapes(0)}
        for run, at, count in self._pieces(start, end):
            planes = (plane for store in run.extent.stores for plane in store)
            for views, plane in zip(parts.values(), planes, strict=True):
                views.append(plane.squeeze(1).narrow(2, at, count))
        return parts

    def shapes(self, count: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what `tensors` gives for ``count`` tokens, put together."""
        return {
            f"{name}.{number}": plane
            for number, (shape, layers) in enumerate(self.layout.groups().items())
            for name, plane in self.layout.planes(shape, len(layers), count).items()
        }

    def _cut(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        while self.runs and self.runs[-1].start >= max(1, length):
            self.runs.pop().extent.drop()
        if self.runs:
            last = self.runs[-1]
            last.tokens = min(last.tokens, length - last.start)

    def _own_tail(self) -> None:
        """See to it that the next token can be written, or begins a page that is not there yet."""
        if not self.runs or self.runs[-1].writable:
            return
        last = self.runs[-1]
        copied = last.tokens % PAGE
        last.tokens -= copied
        if copied:
            own = Extent(self._pool, self.layout, PAGE)
            own.take(0, last.extent, last.tokens, copied)
            self.runs.append(Run(own, last.end, copied))
        if not last.tokens:
            self.runs.remove(last)
            last.extent.drop()

    def _fit(self, room: int, end: int) -> None:
        """Have extents for ``end`` tokens, and the last of them as large as ``room`` tokens allow."""
        self._trim_runs()
        covered = 0
        if self.runs:
            if self.runs[-1].writable:
                self._resize_tail(room)
            last = self.runs[-1]
            covered = last.start + (last.extent.capacity if last.writable else last.tokens)
        while covered < end:
            extent = Extent(self._pool, self.layout, min(room - covered, self.layout.extent))
            self.runs.append(Run(extent, covered, 0))
            covered += extent.capacity

    def _trim_runs(self) -> None:
        """Give back what only others read of extents before the last, now that they do so no more."""
        for run in self.runs[:-1]:
            if run.writable and run.extent.capacity > run.tokens:
                run.extent.resize(run.tokens, run.tokens)

    def _resize_tail(self, room: int) -> None:
        tail, limit = self.runs[-1], self.layout.extent
        capacity = min(room - tail.start, limit)
        if capacity > tail.extent.capacity and len(self.runs) > 1:
            before = self.runs[-2]
            joined = min(room - before.start, limit)
            if before.writable and joined >= tail.start - before.start + capacity:
                before.extent.resize(joined, before.tokens)
                before.extent.take(before.tokens, tail.extent, 0, tail.tokens)
                before.tokens += tail.tokens
                self.runs.pop().extent.drop()
                return
        if capacity != tail.extent.capacity:
            tail.extent.resize(capacity, tail.tokens)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[Run, int, int]]:
        """The runs that have some of the tokens ``start:end``: from which on in there, and how many."""
        for run in self.runs:
            first, last = max(start, run.start), min(end, run.end)
            if first < last:
                yield run, first - run.start, last - first

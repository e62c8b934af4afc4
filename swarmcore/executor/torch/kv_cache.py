"""Attention caches: keys and values of one sequence in all blocks of a span.

Every key is kept, also by layers with a sliding window (they read only the last ones), so that a cache can be
rolled back to any earlier position exactly, by forgetting what lies after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

PAGE = 64
"""Caches grow in multiples of this many tokens."""

Views = Sequence[torch.Tensor]
"""One tensor per layer."""


@attrs.frozen
class LayerShape:
    """What one token leaves in one layer's cache."""

    heads: int
    """Key/value heads."""
    key_size: int
    value_size: int

    @property
    def values(self) -> int:
        return self.heads * (self.key_size + self.value_size)


@attrs.frozen
class CacheLayout:
    """The caches of some blocks: one shape per layer, one dtype and device for all."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.values for layer in self.layers) * self.dtype.itemsize

    def part(self, first: int, last: int) -> CacheLayout:
        """The layout of the layers ``first:last`` of these."""
        return attrs.evolve(self, layers=self.layers[first:last])


class SequenceCache:
    """The cache of one sequence: ``length`` tokens stored, a prefix included, room for ``capacity``.

    Layers of equal shape share one tensor, ``[layers, 1, heads, capacity, size]``, so that a step's views are
    made by a few calls rather than a few per layer.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.length = 0
        self.capacity = 0
        self.reserved = 0
        """Tokens the cache is to have room for at its next step."""
        self.prefix = 0
        """How many of the tokens were put before the sequence's own, for good."""
        self.layout = layout
        self._groups: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(layout.layers):
            self._groups.setdefault(shape, []).append(index)
        self._stores: dict[LayerShape, tuple[torch.Tensor, torch.Tensor]] = {}

    def __repr__(self) -> str:
        return f"<SequenceCache {self.length}/{self.capacity} tokens>"

    def prepare(self, start: int, end: int) -> None:
        """Roll back to ``start`` and make room up to ``end``; the tokens between count as stored from now on.

        Takes or gives back memory, which invalidates views. ``start`` is at most ``length``.
        """
        capacity = -(-max(self.reserved, end) // PAGE) * PAGE
        if capacity != self.capacity:
            self._resize(capacity, start)
        self.length = end

    def begin_with(self, prefixes: Sequence[torch.Tensor]) -> None:
        """Put keys and values, ``[2, tokens, heads, size]`` for each layer, into a cache that is empty."""
        self.prefix = prefixes[0].shape[1]
        self.prepare(0, self.prefix)
        for prefix, keys, values in zip(prefixes, *self.views(0, self.prefix), strict=True):
            keys[0].copy_(prefix[0].transpose(0, 1))
            values[0].copy_(prefix[1].transpose(0, 1))

    def trim(self) -> None:
        """Give back at once what lies beyond the reservation. Not while a batch holds views of this cache."""
        capacity = -(-max(self.reserved, self.prefix) // PAGE) * PAGE
        if capacity < self.capacity:
            self.length = min(self.length, capacity)
            self._resize(capacity, self.length)

    def copy(self, reserved: int, tokens: int | None = None) -> SequenceCache:
        """A cache of its own with the same tokens, the first ``tokens`` of them or all, as far as there is
        room for them in ``reserved``."""
        new = SequenceCache(self.layout)
        new.reserved, new.prefix = reserved, self.prefix
        new._resize(-(-max(reserved, self.prefix) // PAGE) * PAGE, 0)
        new.length = length = min(self.length if tokens is None else tokens, new.capacity)
        for shape, pair in self._stores.items():
            for source, target in zip(pair, new._stores[shape], strict=True):
                target[..., :length, :] = source[..., :length, :]
        return new

    def tensors(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """Keys and values of the tokens ``start:end`` by name, views of ``[layers, heads, tokens, size]``.

        The layers of one shape are together, in order: ``keys.0`` and ``values.0`` are those of the shape
        that the first layer has, and so on.
        """
        parts = {}
        for number, shape in enumerate(self._groups):
            for name, store in zip(("keys", "values"), self._stores[shape], strict=True):
                parts[f"{name}.{number}"] = store[:, 0, :, start:end]
        return parts

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what `tensors` gives for ``count`` tokens."""
        shapes: dict[str, tuple[int, ...]] = {}
        for number, (shape, layers) in enumerate(self._groups.items()):
            for name, size in (("keys", shape.key_size), ("values", shape.value_size)):
                shapes[f"{name}.{number}"] = (len(layers), shape.heads, count, size)
        return shapes

    def views(self, start: int, end: int) -> tuple[Views, Views]:
        """Keys and values of the tokens ``start:end``, ``[1, heads, end - start, size]`` for each layer."""
        if len(self._groups) == 1:
            [(keys, values)] = self._stores.values()
            return _unstack(keys, start, end), _unstack(values, start, end)
        layers = len(self.layout.layers)
        all_keys, all_values = [torch.Tensor()] * layers, [torch.Tensor()] * layers
        for shape, indices in self._groups.items():
            keys, values = self._stores[shape]
            for index, key, value in zip(
                indices, _unstack(keys, start, end), _unstack(values, start, end), strict=True
            ):
                all_keys[index], all_values[index] = key, value
        return all_keys, all_values

    def _resize(self, capacity: int, keep: int) -> None:
        for shape, indices in self._groups.items():
            old = self._stores.pop(shape, None)
            new = tuple(
                torch.empty(
                    (len(indices), 1, shape.heads, capacity, size),
                    dtype=self.layout.dtype,
                    device=self.layout.device,
                )
                for size in (shape.key_size, shape.value_size)
            )
            if old is not None:
                for source, target in zip(old, new, strict=True):
                    target[..., :keep, :] = source[..., :keep, :]
            self._stores[shape] = (new[0], new[1])
        self.capacity = capacity


def _unstack(store: torch.Tensor, start: int, end: int) -> Views:
    return store.narrow(3, start, end - start).unbind(0)

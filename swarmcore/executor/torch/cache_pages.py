"""Memory of attention caches: extents of whole pages, counted by references.

A page is room for `PAGE` tokens. Pages that follow each other in a sequence lie in one *extent*, which
products read as it lies, where single pages would have to be gathered first. Sequences that have tokens in
common refer to the same extents.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import random
from itertools import chain

import attrs
import torch

from swarmcore.errors import InputError

PAGE = 64
"""Tokens of a page; caches are held in multiples of it."""

EXTENT = 32 * PAGE
"""Tokens of the largest extent on a CPU: no more is copied when a sequence grows, or held twice meanwhile."""

_MAPPED = 256 * 1024
"""Tensors of at least this many bytes are mappings of their own on CPUs. These are the system's again as soon
as they are free, and take memory only where they have been written; an allocator keeps what it had."""

_LARGEST = 127.0
"""What the largest value of a row becomes as an int8."""

CACHE_DTYPES = ("auto", "int8")
"""What keys and values may be kept in; ``"auto"`` is what is computed in."""

Planes = tuple[torch.Tensor, ...]
"""Keys and values, ``[..., heads, tokens, size]``, and the scales of int8 ones, ``[..., heads, tokens]``."""


def pages_of(tokens: int) -> int:
    """Room for ``tokens`` tokens, in tokens: whole pages."""
    return -(-tokens // PAGE) * PAGE


def parse_cache_dtype(name: str) -> bool:
    """Whether caches are quantised. Raise `InputError` for a name that is not of `CACHE_DTYPES`."""
    if name not in CACHE_DTYPES:
        raise InputError(f"cache dtype {name!r} is not known; use {', '.join(CACHE_DTYPES)}")
    return name == "int8"


@attrs.frozen
class LayerShape:
    """What one token leaves in one layer's cache."""

    heads: int
    """Key/value heads."""
    key_size: int
    value_size: int


@attrs.frozen
class CacheLayout:
    """The caches of some blocks: one shape per layer, one dtype and device for all."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    """What is computed in."""
    device: torch.device
    quantised: bool = False
    """Whether keys and values are kept as int8, with a float32 scale for each token and head."""

    @property
    def bytes_per_token(self) -> int:
        return sum(
            torch.Size(size).numel() * dtype.itemsize
            for shape in self.layers
            for size, dtype in self.planes(shape, 1, 1).values()
        )

    @property
    def stored(self) -> torch.dtype:
        """What keys and values are kept in."""
        return torch.int8 if self.quantised else self.dtype

    @property
    def extent(self) -> int:
        """Tokens of the largest extent. Kernels of GPUs want a sequence in one piece, however long it is."""
        return EXTENT if self.device.type == "cpu" else 2**40

    def part(self, first: int, last: int) -> CacheLayout:
        """The layout of the layers ``first:last`` of these."""
        return attrs.evolve(self, layers=self.layers[first:last])

    def groups(self) -> dict[LayerShape, list[int]]:
        """The layers of each shape, in the order in which shapes first come."""
        groups: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(self.layers):
            groups.setdefault(shape, []).append(index)
        return groups

    def planes(
        self, shape: LayerShape, layers: int, tokens: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Size and dtype of what ``layers`` layers of one shape keep of ``tokens`` tokens, by name."""
        rows = layers, shape.heads, tokens
        planes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "rotated_keys" if self.quantised else "keys": ((*rows, shape.key_size), self.stored),
            "values": ((*rows, shape.value_size), self.stored),
        }
        if self.quantised:
            planes["key_scales"] = planes["value_scales"] = rows, torch.float32
        return planes


def stored(layout: CacheLayout, keys: torch.Tensor, values: torch.Tensor) -> Planes:
    """New keys and values as a cache keeps them."""
    if not layout.quantised:
        return keys, values
    (keys, key_scales), (values, value_scales) = _quantise(rotated(keys)), _quantise(values)
    return keys, values, key_scales, value_scales


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """``[..., size]`` turned so that what a few channels have is spread over many.

    Scores of queries and keys that are both turned stay what they are. In most models some channels of the
    keys are far larger than all others, which would be left with a few of the integers.
    """
    return rows @ _rotation(rows.shape[-1], rows.dtype, rows.device)


@functools.cache
def _rotation(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Orthogonal, and the same on every machine: signs, then Hadamard matrices along the diagonal."""
    block = torch.ones(1, 1, device="cpu")
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    signs = random.Random(size)
    turned = torch.tensor([[1.0 if signs.random() < 0.5 else -1.0] for _ in range(size)], device="cpu")
    blocks: torch.Tensor = torch.kron(torch.eye(size // len(block), device="cpu"), block)
    with torch.inference_mode(False):
        rotation: torch.Tensor = (turned * blocks / len(block) ** 0.5).to(device, dtype)
    return rotation


def restored(layout: CacheLayout, planes: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they are computed with; keys that are `rotated` where they are quantised."""
    if not layout.quantised:
        return planes[0], planes[1]
    keys, values, key_scales, value_scales = planes
    return (
        (keys * key_scales.unsqueeze(-1)).to(layout.dtype),
        (values * value_scales.unsqueeze(-1)).to(layout.dtype),
    )


def _quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., size]`` as int8, and the scale of each row, ``[...]``, by which it is to be multiplied."""
    scales = rows.abs().amax(-1).float() / _LARGEST
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return (rows / divisors).round_().to(torch.int8), scales


class PagePool:
    """Counts the memory of an executor's extents: each once, however many sequences share it."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __repr__(self) -> str:
        return f"<PagePool {self.nbytes} bytes>"


class Extent:
    """Room for the tokens of consecutive pages, in all layers."""

    def __init__(self, pool: PagePool, layout: CacheLayout, capacity: int) -> None:
        self.references = 1
        """Caches that read it. Only one that is alone with it may write."""
        self.capacity = 0
        """Tokens, whole pages."""
        self.stores: list[Planes] = []
        """For each shape of layers ``[layers, 1, heads, capacity, size]``."""
        self.layers: list[Planes] = []
        """For each layer ``[heads, capacity, size]``, the same memory."""
        self._pool, self._layout = pool, layout
        self.resize(capacity, 0)

    def __repr__(self) -> str:
        return f"<Extent {self.capacity} tokens, {self.references} references>"

    def resize(self, capacity: int, keep: int) -> None:
        """Room for ``capacity`` tokens; the first ``keep`` stay. Invalidates views."""
        layout, stores = self._layout, list[Planes]()
        for number, (shape, layers) in enumerate(layout.groups().items()):
            # Zeros, since products read what nobody has written yet as well: no NaN may be there.
            planes = tuple(
                _zeros((size[0], 1, *size[1:]), dtype, layout.device)
                for size, dtype in layout.planes(shape, len(layers), capacity).values()
            )
            if keep:
                _copy(self.stores[number], 0, planes, 0, keep)
            stores.append(planes)
        self._pool.nbytes += (capacity - self.capacity) * layout.bytes_per_token
        self.capacity, self.stores = capacity, stores
        self.layers = self._by_layer([[plane.squeeze(1).unbind(0) for plane in planes] for planes in stores])

    def take(self, at: int, other: Extent, start: int, count: int) -> None:
        """Copy ``count`` tokens of ``other``, from its token ``start`` on, to ``at``."""
        for source, target in zip(other.stores, self.stores, strict=True):
            _copy(source, start, target, at, count)

    def wipe(self, start: int, count: int) -> None:
        """Leave nothing of ``count`` tokens."""
        for plane in chain.from_iterable(self.stores):
            plane.narrow(3, start, count).zero_()

    def slots(self, start: int, count: int) -> list[Planes]:
        """Where ``count`` tokens from ``start`` on are, for each layer ``[1, heads, count, size]``."""
        return self._by_layer(
            [[plane.narrow(3, start, count).unbind(0) for plane in planes] for planes in self.stores]
        )

    def share(self) -> Extent:
        self.references += 1
        return self

    def drop(self) -> None:
        """One cache less reads it; without any its memory is free."""
        self.references -= 1
        if not self.references:
            self._pool.nbytes -= self.capacity * self._layout.bytes_per_token
            self.capacity, self.stores, self.layers = 0, [], []

    def _by_layer(self, groups: list[list[Planes]]) -> list[Planes]:
        """``groups`` has the layers of each plane of each shape."""
        if len(groups) == 1:
            return list(zip(*groups[0], strict=True))
        layers: list[Planes] = [()] * len(self._layout.layers)
        for planes, indices in zip(groups, self._layout.groups().values(), strict=True):
            for index, layer in zip(indices, zip(*planes, strict=True), strict=True):
                layers[index] = layer
        return layers


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    nbytes = torch.Size(size).numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _MAPPED:
        return torch.zeros(size, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, nbytes, **private)
    except OSError as exc:
        raise MemoryError(f"no {nbytes} bytes for an attention cache") from exc
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # it is faster, where the system does it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)


def _copy(source: Planes, start: int, target: Planes, at: int, count: int) -> None:
    for old, new in zip(source, target, strict=True):
        new.narrow(3, at, count).copy_(old.narrow(3, start, count))

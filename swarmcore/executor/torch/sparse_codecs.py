"""Tensor codecs that keep the largest entries: ``topk…`` and nothing else, ``mixed…`` the rest in few bits.

Both work on blocks of up to 256 values, and keep the entries of largest magnitude *of each block*. So the
encoded size follows from the shape, an index takes a byte, and no row with huge values (the first token of a
sequence has them) takes the share of all others. A block is 256 values; or 192, 128 or 64 where rows are a
multiple of that only, so that none reaches into the next row. Where rows are no multiple of 64 they are taken
one after the other, and the last block is filled up with zeros.

``topk0.1`` keeps 26 of 256, about a tenth, as float8 (e4m3: 3 bits of mantissa, so 7 % error at most, and a
range of 2**17 within a block) times the block's scale; all others decode to 0. Encoded form of ``n`` blocks
with ``k`` kept: ``n`` bfloat16 scales; where they are, ``k`` ascending bytes for each block or, when that is
shorter, a bitmap; ``n * k`` float8 values. It is meant for what is sparse or has error feedback
(`swarmcore.training.local_steps.vectors`).

``mixed4`` keeps two of each 64, eight of 256, as bfloat16 and rounds the others to 16 levels, those that suit
a normal distribution without its tails, times the root mean square of each 64. Encoded form of ``n`` blocks
with ``k`` kept: ``n * k`` bfloat16 values; as many bytes, ascending in each block, that say where they are; a
bfloat16 scale for each 64; for each block four bit planes. ``mixed3``, ``mixed2`` and ``mixed1`` have fewer
levels. Hidden states and their gradients are dense but for some huge channels: at equal size this form is far
better for them.

A block with a value that is not finite decodes to one with NaN in it: nothing poisoned is made to look sound.
Importing this module registers the codecs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from swarmcore.errors import InputError, ProtocolError
from swarmcore.executor.torch.device import DTYPES
from swarmcore.wire.tensors import register_codec

BLOCKS = (256, 192, 128, 64)
"""Sizes of a block, the preferred first."""

SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""Of the entries, that a ``topk`` codec keeps."""

SCALED = 64
"""Values with a scale of their own in a ``mixed`` codec."""

OUTLIERS = 2
"""Entries that a ``mixed`` codec keeps for each `SCALED` of a block."""

_CHUNK_VALUES = 2**16
"""Values converted at a time, so that the float32 intermediates stay in the CPU's cache."""

_CPU = torch.device("cpu")
"""Said everywhere: a program may have made another device the default."""

_FLOAT8_MAX = 448.0
_SMALLEST = torch.finfo(torch.float32).tiny


def block_size(shape: tuple[int, ...]) -> int:
    """Values of a block for a tensor of this shape."""
    width = shape[-1] if shape else 1
    return next((size for size in BLOCKS if width % size == 0), BLOCKS[0])


class TopKCodec:
    """The largest entries of each block, for float32, bfloat16 and float16."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __repr__(self) -> str:
        return f"<TopKCodec {self.share}>"

    def kept(self, block: int) -> int:
        """Entries of a block that are kept."""
        return max(1, round(self.share * block))

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `InputError` for a dtype that is not a float."""
        encoded = _room_for(self, dtype, shape)
        block = block_size(shape)
        kept = self.kept(block)
        scales, places, values = self._sections(encoded, block)
        for part, blocks in _float_blocks(data, dtype, block):
            where = _largest(blocks, kept)
            entries = blocks.gather(1, where)
            scale = entries.abs().amax(1, keepdim=True).div_(_FLOAT8_MAX).bfloat16()
            scaled = torch.where(scale == 0, 0, entries / scale.float()).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX)
            scales[part] = scale
            values[part] = scaled.to(torch.float8_e4m3fn)
            places[part] = where.to(torch.uint8) if kept <= block // 8 else _bitmap(where, block)
        return memoryview(encoded)

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `ProtocolError` when a block does not have exactly its number of distinct places."""
        block = block_size(shape)
        kept = self.kept(block)
        scales, places, values = self._sections(data, block)
        decoded = _Decoded(dtype, math.prod(shape), block)
        for part in _parts(len(scales), block):
            where = _ascending(places[part], block) if kept <= block // 8 else _marked(places[part], kept)
            entries = values[part].float() * scales[part].float()
            decoded.put(part, torch.zeros(len(where), block, device=_CPU).scatter_(1, where, entries))
        return decoded.data

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        _check_dtype(dtype)
        block = block_size(shape)
        return _count_blocks(shape) * sum(self._widths(block))

    def _widths(self, block: int) -> tuple[int, ...]:
        kept = self.kept(block)
        return 2, min(kept, block // 8), kept

    def _sections(self, encoded: memoryview | bytearray, block: int) -> tuple[torch.Tensor, ...]:
        scales, places, values = _split(encoded, self._widths(block))
        return scales.view(torch.bfloat16), places, values.view(torch.float8_e4m3fn)


class MixedCodec:
    """The largest entries of each block, and the rest in ``bits`` bits each; for the same dtypes."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        levels = [*(-level for level in reversed(LEVELS[bits])), *LEVELS[bits]]
        self._levels = torch.tensor(levels, device=_CPU)
        self._limits = (self._levels[1:] + self._levels[:-1]) / 2

    def __repr__(self) -> str:
        return f"<MixedCodec of {self.bits} bits>"

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `InputError` for a dtype that is not a float."""
        encoded = _room_for(self, dtype, shape)
        block = block_size(shape)
        outliers, places, scales, planes = self._sections(encoded, block)
        for part, blocks in _float_blocks(data, dtype, block):
            where = _largest(blocks, OUTLIERS * block // SCALED)
            outliers[part] = _to_bfloat16(blocks.gather(1, where))
            places[part] = where.to(torch.uint8)
            rest = blocks.scatter(1, where, 0).view(len(blocks), -1, SCALED)
            scale = _root_mean_square(rest).bfloat16()
            scales[part] = scale.squeeze(2)
            codes = torch.bucketize(rest / scale.float().clamp_min(_SMALLEST), self._limits, out_int32=True)
            codes = codes.view(blocks.shape)
            for bit in range(self.bits):
                planes[part, bit] = _pack((codes >> bit) & 1)
        return memoryview(encoded)

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `ProtocolError` when the places of a block's largest entries are not in order."""
        block = block_size(shape)
        outliers, places, scales, planes = self._sections(data, block)
        decoded = _Decoded(dtype, math.prod(shape), block)
        for part in _parts(len(places), block):
            where = _ascending(places[part], block)
            codes = torch.zeros(len(where), block, dtype=torch.int32, device=_CPU)
            for bit in range(self.bits):
                codes |= _unpack(planes[part, bit]).int() << bit
            rest = self._levels[codes].view(len(where), -1, SCALED) * scales[part].float().unsqueeze_(2)
            decoded.put(part, rest.view(codes.shape).scatter_(1, where, outliers[part].float()))
        return decoded.data

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        _check_dtype(dtype)
        return _count_blocks(shape) * sum(self._widths(block_size(shape)))

    def _widths(self, block: int) -> tuple[int, ...]:
        scaled = block // SCALED
        return 2 * OUTLIERS * scaled, OUTLIERS * scaled, 2 * scaled, self.bits * block // 8

    def _sections(self, encoded: memoryview | bytearray, block: int) -> tuple[torch.Tensor, ...]:
        outliers, places, scales, planes = _split(encoded, self._widths(block))
        planes = planes.view(len(planes), self.bits, block // 8)
        return outliers.view(torch.bfloat16), places, scales.view(torch.bfloat16), planes


class _Decoded:
    """Raw values of a dtype, filled block by block."""

    def __init__(self, dtype: str, count: int, block: int) -> None:
        self._values = torch.empty(count, dtype=DTYPES[dtype], device=_CPU)
        self._block = block
        self._limit = torch.finfo(DTYPES[dtype]).max

    def put(self, part: slice, blocks: torch.Tensor) -> None:
        """Set the blocks ``part`` from float32 ones; what is beyond the end is filling."""
        target = self._values[part.start * self._block : part.stop * self._block]
        # What was rounded up must not carry the largest values of the dtype over to infinity.
        target.copy_(blocks.clamp_(-self._limit, self._limit).view(-1)[: len(target)])

    @property
    def data(self) -> memoryview:
        return self._values.view(torch.uint8).numpy().data if len(self._values) else memoryview(b"")


def _parts(count: int, block: int) -> Iterator[slice]:
    """Blocks to convert together."""
    step = _CHUNK_VALUES // block
    return (slice(first, first + step) for first in range(0, count, step))


def _float_blocks(data: memoryview, dtype: str, block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks as float32, some at a time, and which ones they are."""
    if not data.nbytes:
        return
    values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=DTYPES[dtype])
    for part in _parts(-(-len(values) // block), block):
        chunk = values[part.start * block : part.stop * block].float()
        yield part, torch.nn.functional.pad(chunk, (0, -len(chunk) % block)).view(-1, block)


def _largest(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the largest magnitudes of each block, in ascending order; NaN is larger than all else."""
    return blocks.abs().topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _ascending(places: torch.Tensor, block: int) -> torch.Tensor:
    """Places read from bytes."""
    where = places.long()
    if bool((where[:, 1:] <= where[:, :-1]).any()) or bool((where[:, -1] >= block).any()):
        raise ProtocolError(
            f"places of the largest entries are not {where.shape[1]} ascending ones of {block}"
        )
    return where


def _marked(bitmap: torch.Tensor, kept: int) -> torch.Tensor:
    """Places read from a bitmap."""
    marked = _unpack(bitmap)
    if bool((marked.sum(1) != kept).any()):
        raise ProtocolError(f"a bitmap of the largest entries does not mark {kept} of {marked.shape[1]}")
    return marked.nonzero()[:, 1].view(-1, kept)


def _bitmap(where: torch.Tensor, block: int) -> torch.Tensor:
    bits = torch.zeros(len(where), block, dtype=torch.int32, device=_CPU)
    return _pack(bits.scatter_(1, where, 1))


def _to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Rounded, but never from a finite value to infinity; what is not finite becomes NaN."""
    limit = torch.finfo(torch.bfloat16).max
    return torch.where(values.isfinite(), values.clamp(-limit, limit), torch.nan).bfloat16()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    """Of the last dimension. Scaled before squaring: the largest float32 values have no square."""
    largest = values.abs().amax(-1, keepdim=True)
    return largest * (values / largest.clamp_min(_SMALLEST)).square_().mean(-1, keepdim=True).sqrt_()


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=_CPU)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """``[blocks, block]`` of 0 and 1 to ``[blocks, block / 8]`` bytes, the lowest bit first."""
    return (bits.to(torch.uint8).view(len(bits), -1, 8) * _BITS).sum(2, dtype=torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """``[blocks, block / 8]`` bytes to ``[blocks, block]`` booleans."""
    return (packed.unsqueeze(2) & _BITS).ne(0).view(len(packed), packed.shape[1] * 8)


def _split(encoded: memoryview | bytearray, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """The sections one after the other, as bytes ``[blocks, width]`` that share the memory."""
    if not encoded:  # torch cannot make a tensor of no bytes
        return [torch.empty(0, width, dtype=torch.uint8, device=_CPU) for width in widths]
    readonly = isinstance(encoded, memoryview) and encoded.readonly
    whole = torch.frombuffer(bytearray(encoded) if readonly else encoded, dtype=torch.uint8)
    count = len(whole) // sum(widths)
    sections = torch.split(whole, [count * width for width in widths])
    return [section.view(count, width) for section, width in zip(sections, widths, strict=True)]


def _count_blocks(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // block_size(shape))


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ProtocolError(f"codecs topk and mixed take {', '.join(DTYPES)}, not {dtype}")


def _room_for(codec: TopKCodec | MixedCodec, dtype: str, shape: tuple[int, ...]) -> bytearray:
    try:
        return bytearray(codec.encoded_nbytes(dtype, shape))
    except ProtocolError as exc:
        raise InputError(exc.message) from exc


LEVELS = {
    1: (0.8173,),
    2: (0.4463, 1.4538),
    3: (0.2313, 0.7081, 1.2343, 1.8776),
    4: (0.117, 0.3527, 0.5939, 0.8451, 1.1118, 1.4024, 1.7298, 2.1183),
}
"""The positive levels, by bits: those of least squared error for normal values without the largest 8 of 256
whose root mean square is 1 (by Lloyd's algorithm). Part of the format."""

for _share in SHARES:
    register_codec(f"topk{_share}", TopKCodec(_share))
for _bits in LEVELS:
    register_codec(f"mixed{_bits}", MixedCodec(_bits))

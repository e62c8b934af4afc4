"""Tensor codecs that keep the largest entries: ``topk…`` and nothing else, ``mixed…`` the rest in few bits.

Both work on blocks of 256 values, the last one filled up with zeros, and keep the entries of largest
magnitude *of each block*. So the encoded size follows from the shape, an index takes a byte, none can point
outside, and no row with huge values (the first token of a sequence has them) takes the share of all others.

``topk0.1`` keeps 26 of the 256, about a tenth, as float8 (e4m3: 3 bits of mantissa, so 4 % error at most, and
a range of 2**17 within a block) times the block's scale; all others decode to 0. Encoded form of ``n`` blocks
with ``k`` kept: ``n`` bfloat16 scales; where they are, a bitmap of 32 bytes for each block or, when that is
shorter, ``k`` ascending bytes; ``n * k`` float8 values. It is meant for what is sparse or has error feedback
(`swarmcore.executor.torch.residuals`).

``mixed4`` keeps 8 of the 256 as bfloat16 and rounds the others to 16 levels, those that suit a normal
distribution without its tails, times the root mean square of each 64. Encoded form of ``n`` blocks: ``8 * n``
bfloat16 values; ``8 * n`` ascending bytes that say where they are; ``4 * n`` bfloat16 scales; four bit planes
of 32 bytes for each block. ``mixed3``, ``mixed2`` and ``mixed1`` have fewer levels. Hidden states and their
gradients are dense but for some huge channels: at equal size this form is far better for them.

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

BLOCK = 256
SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""Of the entries, that a ``topk`` codec keeps."""

OUTLIERS = 8
"""Entries of each block that a ``mixed`` codec keeps."""

SCALED = 64
"""Values with a scale of their own in a ``mixed`` codec."""

_BITMAP = BLOCK // 8
_CHUNK = 256
"""Blocks converted at a time, so that the float32 intermediates stay in the CPU's cache."""

_FLOAT8_MAX = 448.0
_SMALLEST = torch.finfo(torch.float32).tiny


class TopKCodec:
    """The largest entries of each block of 256, for float32, bfloat16 and float16."""

    def __init__(self, share: float) -> None:
        self.kept = max(1, round(share * BLOCK))
        """Of each block."""
        self._places = min(self.kept, _BITMAP)
        """Bytes that say where a block's entries are."""

    def __repr__(self) -> str:
        return f"<TopKCodec {self.kept} of {BLOCK}>"

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `InputError` for a dtype that is not a float."""
        encoded = bytearray(_checked_nbytes(self, dtype, shape))
        scales, places, values = self._parts(encoded)
        for start, blocks in _float_blocks(data, dtype):
            last = start + len(blocks)
            where = _largest(blocks, self.kept)
            entries = blocks.gather(1, where)
            scale = entries.abs().amax(1).div_(_FLOAT8_MAX).bfloat16()
            scales[start:last] = scale
            divisor = scale.float().unsqueeze_(1)
            scaled = torch.where(divisor == 0, 0, entries / divisor).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX)
            values[start:last] = scaled.to(torch.float8_e4m3fn)
            places[start:last] = _bitmap(where) if self.kept > _BITMAP else where.to(torch.uint8)
        return memoryview(encoded)

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `ProtocolError` when a block does not have exactly its number of distinct places."""
        scales, places, values = self._parts(data)
        decoded = _Decoded(dtype, math.prod(shape))
        for start in range(0, len(scales), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            where = self._where(places[chunk])
            entries = values[chunk].float() * scales[chunk].float().unsqueeze_(1)
            decoded.put(start, torch.zeros(len(where), BLOCK).scatter_(1, where, entries))
        return decoded.data

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        _check_dtype(dtype)
        return _count_blocks(shape) * (2 + self._places + self.kept)

    def _where(self, places: torch.Tensor) -> torch.Tensor:
        if self.kept <= _BITMAP:
            return _ascending(places)
        marked = _unpack(places)
        if bool((marked.sum(1) != self.kept).any()):
            raise ProtocolError(f"a bitmap of a top-k tensor does not mark {self.kept} places of {BLOCK}")
        return marked.nonzero()[:, 1].view(-1, self.kept)

    def _parts(self, encoded: memoryview | bytearray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(encoded) // (2 + self._places + self.kept)
        scales, places, values = _sections(encoded, 2 * count, self._places * count, self.kept * count)
        return (
            scales.view(torch.bfloat16),
            places.view(count, self._places),
            values.view(torch.float8_e4m3fn).view(count, self.kept),
        )


class MixedCodec:
    """The 8 largest entries of each block of 256, and the rest in ``bits`` bits each; for the same dtypes."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._levels = torch.tensor([-level for level in reversed(_LEVELS[bits])] + list(_LEVELS[bits]))
        self._limits = (self._levels[1:] + self._levels[:-1]) / 2
        self._sizes = (2 * OUTLIERS, OUTLIERS, 2 * BLOCK // SCALED, bits * _BITMAP)
        """Bytes of each section, for one block."""

    def __repr__(self) -> str:
        return f"<MixedCodec of {self.bits} bits>"

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `InputError` for a dtype that is not a float."""
        encoded = bytearray(_checked_nbytes(self, dtype, shape))
        outliers, places, scales, planes = self._parts(encoded)
        for start, blocks in _float_blocks(data, dtype):
            last = start + len(blocks)
            where = _largest(blocks, OUTLIERS)
            outliers[start:last] = _to_bfloat16(blocks.gather(1, where))
            places[start:last] = where.to(torch.uint8)
            rest = blocks.scatter(1, where, 0).view(len(blocks), -1, SCALED)
            # Scaled before it is squared: large float32 values have no square.
            largest = rest.abs().amax(2, keepdim=True)
            ratio = rest / largest.clamp_min(_SMALLEST)
            scale = (largest * ratio.square().mean(2, keepdim=True).sqrt()).bfloat16()
            scales[start:last] = scale.squeeze(2)
            scaled = rest / scale.float().clamp_min(_SMALLEST)
            codes = torch.bucketize(scaled, self._limits, out_int32=True).view(len(blocks), BLOCK)
            for bit in range(self.bits):
                planes[start:last, bit] = _pack((codes >> bit) & 1)
        return memoryview(encoded)

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `ProtocolError` when the places of a block's largest entries are not in order."""
        outliers, places, scales, planes = self._parts(data)
        decoded = _Decoded(dtype, math.prod(shape))
        for start in range(0, len(places), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            where = _ascending(places[chunk])
            codes = torch.zeros(len(where), BLOCK, dtype=torch.int32)
            for bit in range(self.bits):
                codes |= _unpack(planes[chunk, bit]).int() << bit
            rest = self._levels[codes].view(len(where), -1, SCALED) * scales[chunk].float().unsqueeze_(2)
            blocks = rest.view(len(where), BLOCK)
            decoded.put(start, blocks.scatter_(1, where, outliers[chunk].float()))
        return decoded.data

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        _check_dtype(dtype)
        return _count_blocks(shape) * sum(self._sizes)

    def _parts(
        self, encoded: memoryview | bytearray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(encoded) // sum(self._sizes)
        outliers, places, scales, planes = _sections(encoded, *(size * count for size in self._sizes))
        return (
            outliers.view(torch.bfloat16).view(count, OUTLIERS),
            places.view(count, OUTLIERS),
            scales.view(torch.bfloat16).view(count, -1),
            planes.view(count, self.bits, _BITMAP),
        )


class _Decoded:
    """Raw values of a dtype, filled block by block."""

    def __init__(self, dtype: str, count: int) -> None:
        self._values = torch.empty(count, dtype=DTYPES[dtype])
        self._limit = torch.finfo(DTYPES[dtype]).max

    def put(self, first: int, blocks: torch.Tensor) -> None:
        """Set float32 blocks from the block ``first`` on; what is beyond the end is filling."""
        target = self._values[first * BLOCK : first * BLOCK + blocks.numel()]
        # What was rounded up must not carry the largest values of the dtype over to infinity.
        target.copy_(blocks.clamp_(-self._limit, self._limit).view(-1)[: len(target)])

    @property
    def data(self) -> memoryview:
        return self._values.view(torch.uint8).numpy().data if len(self._values) else memoryview(b"")


def _float_blocks(data: memoryview, dtype: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks as float32, a chunk at a time, each with the number of its first block."""
    if not data.nbytes:
        return
    values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=DTYPES[dtype])
    for start in range(0, len(values), _CHUNK * BLOCK):
        chunk = values[start : start + _CHUNK * BLOCK].float()
        yield start // BLOCK, torch.nn.functional.pad(chunk, (0, -len(chunk) % BLOCK)).view(-1, BLOCK)


def _largest(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the largest magnitudes of each block, in ascending order; NaN is larger than all else."""
    return blocks.abs().topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _ascending(places: torch.Tensor) -> torch.Tensor:
    """Places read from bytes: all are inside a block; the same one twice is not what `_largest` gives."""
    where = places.long()
    if bool((where[:, 1:] <= where[:, :-1]).any()):
        raise ProtocolError("places of the largest entries of a block are not in ascending order")
    return where


def _to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Rounded, but never from a finite value to infinity; what is not finite becomes NaN."""
    limit = torch.finfo(torch.bfloat16).max
    return torch.where(values.isfinite(), values.clamp(-limit, limit), torch.nan).bfloat16()


def _bitmap(where: torch.Tensor) -> torch.Tensor:
    return _pack(torch.zeros(len(where), BLOCK, dtype=torch.int32).scatter_(1, where, 1))


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """``[blocks, 256]`` of 0 and 1 to ``[blocks, 32]`` bytes, the lowest bit first."""
    return (bits.to(torch.uint8).view(len(bits), -1, 8) * _BITS).sum(2, dtype=torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """``[blocks, 32]`` bytes to ``[blocks, 256]`` booleans."""
    return (packed.unsqueeze(2) & _BITS).ne(0).view(len(packed), -1)


def _sections(encoded: memoryview | bytearray, *sizes: int) -> Iterator[torch.Tensor]:
    """Consecutive bytes; torch cannot make a tensor of none."""
    if not encoded:
        return (torch.empty(0, dtype=torch.uint8) for _ in sizes)
    readonly = isinstance(encoded, memoryview) and encoded.readonly
    whole = torch.frombuffer(bytearray(encoded) if readonly else encoded, dtype=torch.uint8)
    return iter(torch.split(whole, list(sizes)))


def _count_blocks(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // BLOCK)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ProtocolError(f"codecs topk and mixed take {', '.join(DTYPES)}, not {dtype}")


def _checked_nbytes(codec: TopKCodec | MixedCodec, dtype: str, shape: tuple[int, ...]) -> int:
    try:
        return codec.encoded_nbytes(dtype, shape)
    except ProtocolError as exc:
        raise InputError(exc.message) from exc


_LEVELS = {
    1: (0.8173,),
    2: (0.4463, 1.4538),
    3: (0.2313, 0.7081, 1.2343, 1.8776),
    4: (0.117, 0.3527, 0.5939, 0.8451, 1.1118, 1.4024, 1.7298, 2.1183),
}
"""The positive levels: of least squared error for normal values without the largest 8 of 256, of which the
root mean square is 1 (Lloyd's algorithm)."""

for _share in SHARES:
    register_codec(f"topk{_share}", TopKCodec(_share))
for _bits in _LEVELS:
    register_codec(f"mixed{_bits}", MixedCodec(_bits))

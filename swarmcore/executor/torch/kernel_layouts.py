"""In what order kernels of CPUs keep numbers of 4 bits, and back: torch's for int4, bitsandbytes' for nf4."""

from __future__ import annotations

import functools

import torch

Order = tuple[int, slice, slice]
"""How torch packs numbers of 4 bits: so many rows in a block, and which of them are in the low and the high
bits."""


def unpack_int4(packed: torch.Tensor, order: Order, dtype: torch.dtype) -> torch.Tensor:
    """The numbers less 8, ``[in, out]``, of what torch has packed."""
    block, low, high = order
    rows, columns = len(packed), 2 * packed.shape[1]
    numbers = packed.new_empty(columns, rows // block, block, dtype=dtype)
    pairs = packed.view(rows // block, columns, block // 2).transpose(0, 1)
    numbers[..., low] = (pairs & 15).view(torch.int8).sub_(8)
    numbers[..., high] = (pairs >> 4).view(torch.int8).sub_(8)
    return numbers.view(columns, rows)


@functools.cache
def int4_order() -> Order | None:
    """That of this CPU, which is no part of torch's interface: found out by packing the rows' own numbers.

    None when it is of another kind, or torch has no such operator.
    """
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    size, columns = 64, 4
    rows = torch.arange(size, dtype=torch.int32)[:, None].expand(size, columns)
    column = torch.arange(columns, dtype=torch.int32).expand(size, columns)
    packed = [pack(digit.contiguous(), 1) for digit in (rows % 16, rows // 16, column)]
    for block in (64, 32, 16):
        for halves in (
            (slice(0, block // 2), slice(block // 2, None)),
            (slice(0, None, 2), slice(1, None, 2)),
        ):
            found = [8 + unpack_int4(digit, (block, *halves), torch.int32).t() for digit in packed]
            if torch.equal(found[0] + 16 * found[1], rows) and torch.equal(found[2], column):
                return block, *halves
    return None


def into_nf4_order(packed: torch.Tensor) -> torch.Tensor:
    """Of ``[out, in / 2]`` bytes, each of two neighbours in a row with the first in its high bits."""
    rows, pairs = packed.shape
    blocks = packed.view(rows // 32, 2, 16, pairs).permute(0, 1, 3, 2)
    first, second = blocks[:, 0], blocks[:, 1]  # rows 0 to 15 of each block, and 16 to 31
    both = torch.stack([(first >> 4) | (second & 0xF0), (first & 15) | (second << 4)], -1)
    return both.reshape(rows, pairs)


def out_of_nf4_order(packed: torch.Tensor) -> torch.Tensor:
    rows, pairs = packed.shape
    even, odd = packed.view(rows // 32, pairs, 16, 2).unbind(-1)
    first, second = (even << 4) | (odd & 15), (even & 0xF0) | (odd >> 4)
    return torch.stack([first, second], 1).permute(0, 1, 3, 2).reshape(rows, pairs)

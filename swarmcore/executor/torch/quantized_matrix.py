"""Frozen weights in 8 or 4 bits: how they are rounded, multiplied with, and made plain again.

Every kind has scales of its own for each row, or for groups within a row, and rounds weights only, never
activations: what comes out for a row of the input depends on that row alone. A kernel reads packed weights
for a few rows at a time; for many rows a plain copy, made for one product and dropped, is faster. The kernels
give a row the same bits whatever is beside it; the plain product is as close to that as any two kernels are,
so that the number of rows in a batch can change a result by rounding, and what is in the others cannot.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch.nn.functional import linear, pad

from swarmcore.errors import InputError, MissingExtraError, UnsupportedModelError
from swarmcore.executor.torch.kernel_layouts import int4_order, into_nf4_order, out_of_nf4_order, unpack_int4
from swarmcore.executor.torch.nf4_library import Bitsandbytes, bitsandbytes

log = logging.getLogger(__name__)

WEIGHT_TYPES = ("auto", "bf16", "int8", "int4", "nf4")
"""What a server may be asked to keep the weights of its blocks in."""

_DIFFERENT_KERNELS = 0.02
"""What two products with the same weights may differ by, relative to their size; bfloat16 makes a fifth."""

_PART = 2**22
"""Weights that are rounded at a time: doing so takes 20 times the memory of what comes of it."""

Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scales and offsets of groups, and the numbers that stand for their values."""

_verified: set[tuple[Any, ...]] = set()


class QuantizedMatrix(ABC):
    """The weight of a linear layer, ``[out, in]``, in fewer bits; no gradient is ever wanted of it."""

    kind: ClassVar[str]
    kernel_rows: ClassVar[int]
    """Up to so many rows the kernel is faster than a product with plain weights."""
    largest_error: ClassVar[float]
    """What rounding may take of a matrix, relative to its size; ordinary weights lose a third of that."""

    def __init__(self, weight: torch.Tensor, name: str) -> None:
        """Round ``weight``, in the dtype in which products are computed.

        Raise `UnsupportedModelError`, with ``name``, when too little of it is left.
        """
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        parts = [self._pack(part) for part in _parts(weight.detach())]
        self._packed = torch.cat([packed for packed, _ in parts])
        self._scales = self._arranged(torch.cat([scales for _, scales in parts])).contiguous()
        del parts
        error = _relative(self.dense(), weight)
        if not error <= self.largest_error:
            raise UnsupportedModelError(
                f"{name} loses {error:.0%} of itself when it is rounded to {self.kind}: its values are not "
                f"finite, or too unequal in size; load this model with other weights, such as bf16"
            )
        self._has_kernel = self._kernel_fits() and self._kernel_is_right()

    @classmethod
    @abstractmethod
    def bytes_for(cls, rows: int, columns: int, dtype: torch.dtype) -> int:
        """What a matrix of ``[rows, columns]`` takes, on the high side."""

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self._scales.nbytes

    @property
    def has_kernel(self) -> bool:
        """Whether products of a few rows take the packed weights as they are, on this machine."""
        return self._has_kernel

    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``hidden`` times the transposed matrix; gradients reach ``hidden`` and ``bias``."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            output: torch.Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
            return output if bias is None else output + bias
        return self.product(hidden, bias)

    def product(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `multiply`, without a graph."""
        rows = hidden.numel() // self.shape[1]
        if not self._has_kernel or not 0 < rows <= self.kernel_rows or hidden.dtype != self.dtype:
            return linear(hidden, self.dense().to(hidden.dtype), bias)
        output = self._kernel(hidden.reshape(rows, self.shape[1]).contiguous())[:, : self.shape[0]]
        output = output.reshape(*hidden.shape[:-1], self.shape[0])
        return output if bias is None else output.add_(bias)

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The plain matrix, in memory of its own."""

    @abstractmethod
    def _pack(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows of the weight, a multiple of 64 unless they are the last; their scales, a row each."""

    def _arranged(self, scales: torch.Tensor) -> torch.Tensor:
        """All rows' scales as the kernel takes them."""
        return scales

    @abstractmethod
    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """The product for ``[rows, in]``; there may be more columns in it than asked for."""

    @abstractmethod
    def _kernel_fits(self) -> bool:
        """Whether this machine has a kernel for this matrix."""

    def _kernel_is_right(self) -> bool:
        """Compare kernel and plain product, once for each size: both are of libraries, for many machines."""
        key = (self.kind, self.shape, self.dtype, self.device)
        if key not in _verified:
            rows = torch.randn(2, self.shape[1], generator=torch.Generator().manual_seed(0))
            rows = rows.to(self.device, self.dtype)
            found = self._kernel(rows)[:, : self.shape[0]]
            if not _relative(found, linear(rows, self.dense())) < _DIFFERENT_KERNELS:
                wrong = "the %s kernel for %s is wrong on this machine; plain products are used, and slower"
                log.warning(wrong, self.kind, list(self.shape))
                return False
            _verified.add(key)
        return True


class Int8Matrix(QuantizedMatrix):
    """Whole numbers of 8 bits with a scale for each row."""

    kind = "int8"
    kernel_rows = 16
    largest_error = 0.1

    @classmethod
    def bytes_for(cls, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * (columns + dtype.itemsize)

    def dense(self) -> torch.Tensor:
        return self._packed.to(self.dtype).mul_(self._scales[:, None])

    def _pack(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = part.float()
        largest = values.abs().amax(1)
        # Rows that have been rounded before may reach to -128; they stay as they are.
        (scales, whole), other = (self._round(values, largest / most) for most in (127, 128))
        better = _lost(values, *other) < _lost(values, scales, whole)
        whole[better], scales[better] = other[1][better], other[0][better]
        return whole.to(torch.int8), scales.to(self.dtype)

    def _round(self, values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = _not_zero(scales).to(self.dtype).float()
        return scales, (values / scales[:, None]).round_().clamp_(-128, 127)

    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(rows, self._packed, self._scales)

    def _kernel_fits(self) -> bool:
        return self.device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm")


class Int4Matrix(QuantizedMatrix):
    """Whole numbers of 4 bits; each group within a row has a scale and an offset."""

    kind = "int4"
    kernel_rows = 64
    largest_error = 0.3
    group: ClassVar[int] = 32

    @classmethod
    def bytes_for(cls, rows: int, columns: int, dtype: torch.dtype) -> int:
        return _up(rows, 64) * (columns // 2 + 2 * (columns // cls.group) * dtype.itemsize)

    def dense(self) -> torch.Tensor:
        order = int4_order()
        assert order is not None
        # Turned, as both numbers and scales are kept: column by column.
        values = unpack_int4(self._packed, order, self.dtype)
        grouped = values.view(-1, self.group, values.shape[1])
        scales, offsets = (part.contiguous()[:, None] for part in self._scales.unbind(-1))
        torch.addcmul(offsets, grouped, scales, out=grouped)
        return values.t()[: self.shape[0]]

    def _pack(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = part.shape[1]
        values = pad(part.float(), (0, 0, 0, -len(part) % 64)).view(-1, columns // self.group, self.group)
        grid = self._round(values, 15)
        some, finest = values[:64], (grid[0][:64], grid[1][:64], grid[2][:64])
        # Weights that have been on a grid before, by a better method than this, stay where they are.
        if self._lost(some, self._best_grid(some)).sum() < self._lost(some, finest).sum() / 10:
            grid = self._best_grid(values)
        scales, offsets, whole = grid
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            whole.view(-1, columns).to(torch.int32), 1
        )
        return packed, torch.stack([scales, offsets], -1).to(self.dtype)

    def _arranged(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.transpose(0, 1)

    def _best_grid(self, values: torch.Tensor) -> Grid:
        """Of grids with 9 to 16 points for the values of a group, those that lose least."""
        best = self._round(values, 15)
        lost = self._lost(values, best)
        for steps in range(14, 7, -1):
            other = self._round(values, steps)
            now = self._lost(values, other)
            better = now < lost
            lost = torch.where(better, now, lost)
            best = (
                torch.where(better, other[0], best[0]),
                torch.where(better, other[1], best[1]),
                torch.where(better[..., None], other[2], best[2]),
            )
        return best

    def _round(self, values: torch.Tensor, steps: int) -> Grid:
        """On a grid with so many steps from the least value of a group to the greatest."""
        low, high = values.amin(-1), values.amax(-1)
        scales = _not_zero((high - low) / steps).to(self.dtype).float()
        offsets = (low + 8 * scales).to(self.dtype).float()
        whole = (values - offsets[..., None]).div_(scales[..., None]).round_().add_(8).clamp_(0, 15)
        return scales, offsets, whole

    def _lost(self, values: torch.Tensor, grid: Grid) -> torch.Tensor:
        scales, offsets, whole = grid
        return _lost(values - offsets[..., None], scales, whole - 8)

    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._packed, self.group, self._scales
        )
        return product

    def _kernel_fits(self) -> bool:
        return True  # without it there would be no packing


class Nf4Matrix(QuantizedMatrix):
    """bitsandbytes' 4-bit floats, each of 16 values that suit a normal distribution; a scale for 64 of them.

    Where the CPU has its kernel the bytes are in that kernel's order: blocks of 32 rows, and in those, for
    each pair of columns, 64 numbers, of which the first half is in the low bits.
    """

    kind = "nf4"
    kernel_rows = 256
    largest_error = 0.3
    group: ClassVar[int] = 64

    @classmethod
    def bytes_for(cls, rows: int, columns: int, dtype: torch.dtype) -> int:
        return _up(rows, 32) * (columns // 2 + (columns // cls.group) * 4)

    def dense(self) -> torch.Tensor:
        packed, scales = self._packed, self._scales
        if self._reordered:
            packed, scales = out_of_nf4_order(packed), scales.t().float()
            packed, scales = packed[: self.shape[0]], scales[: self.shape[0]].contiguous()
        plain: torch.Tensor = bitsandbytes().operators.dequantize_4bit(
            packed.reshape(-1, 1), scales.view(-1), self.group, Bitsandbytes.KIND, self.shape, self.dtype
        )
        return plain

    def _pack(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = part.shape[1]
        if self._reordered:
            part = pad(part, (0, 0, 0, -len(part) % 32))
        packed, scales = bitsandbytes().operators.quantize_4bit(
            part.contiguous(), self.group, Bitsandbytes.KIND, torch.uint8
        )
        packed, scales = packed.view(-1, columns // 2), scales.view(-1, columns // self.group)
        return into_nf4_order(packed) if self._reordered else packed, scales

    def _arranged(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.to(torch.bfloat16).t() if self._reordered else scales

    @property
    def _reordered(self) -> bool:
        """Whether it is kept for the CPU's kernel, which is for bfloat16."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16 and bitsandbytes().cpu_kernel

    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        shape = len(self._packed), self.shape[1]
        product: torch.Tensor
        if self._reordered:
            product = bitsandbytes().operators.gemv_4bit(
                rows, self._packed, shape, self._scales, bitsandbytes().code, self.group
            )
        else:
            product = bitsandbytes().operators.gemm_4bit(
                rows, self._packed.view(-1, 1), shape, self._scales.view(-1), self.group, Bitsandbytes.KIND
            )
        return product

    def _kernel_fits(self) -> bool:
        return self._reordered or self.device.type != "cpu"


class ExactMatrix(QuantizedMatrix):
    """Nothing is rounded: for tests of what is built upon the others."""

    kind = "exact"
    kernel_rows = 0
    largest_error = 0.0

    @classmethod
    def bytes_for(cls, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * columns * dtype.itemsize

    def dense(self) -> torch.Tensor:
        return self._packed.clone()

    def _pack(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return part, part.new_zeros(0)

    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _kernel_fits(self) -> bool:
        return False


MATRICES: dict[str, type[QuantizedMatrix]] = {
    matrix.kind: matrix for matrix in (Int8Matrix, Int4Matrix, Nf4Matrix, ExactMatrix)
}


def choose_weights(weights: str, stored: str | None, device: torch.device) -> str | None:
    """What weights are kept as on ``device``: one of `MATRICES`, or None for the dtype of the computations.

    ``"auto"`` is ``stored``, what the checkpoint has them in, where there is a kernel for that. Raise
    `InputError` for an unknown name and for a device or a CPU without the kernel, `MissingExtraError` for a
    library that is lacking.
    """
    if weights == "auto":
        if stored not in WEIGHT_TYPES:
            return None
        try:
            return choose_weights(stored, None, device)
        except (InputError, MissingExtraError) as exc:
            log.info("weights in %s are made plain: %s", stored, exc)
            return None
    if weights == "bf16":
        return None
    if weights not in WEIGHT_TYPES:
        raise InputError(f"weights {weights!r} are not known; use {', '.join(WEIGHT_TYPES)}")
    if weights == "nf4":
        bitsandbytes()
    if weights == "int4" and device.type != "cpu":
        raise InputError(f"int4 weights are multiplied on CPUs only, and the device is {device}; use nf4")
    if weights == "int4" and int4_order() is None:
        raise InputError("this version of torch has no int4 kernel for this CPU; use nf4 or int8 weights")
    return weights


def matrix_for(kind: str, columns: int) -> type[QuantizedMatrix]:
    """What weights of that many columns are kept as: those of odd sizes in 8 bits where 4 were asked for."""
    group = getattr(MATRICES[kind], "group", 1)
    return MATRICES[kind] if columns % group == 0 else Int8Matrix


class _Product(torch.autograd.Function):
    """Its backward makes the plain matrix again, for one product."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        output = matrix.product(hidden)
        return output.clone() if output._is_view() else output  # some families add to it in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.matrix.dense().to(gradients[0].dtype), None


def _parts(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(weight, max(_PART // weight.shape[1] // 64, 1) * 64)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far one is from the other; NaN for what is not finite."""
    pairs = list(zip(_parts(found), _parts(expected), strict=True))
    off = sum(float((one.float() - other.float()).square_().sum()) for one, other in pairs)
    size = sum(float(other.float().square().sum()) for _, other in pairs)
    return math.sqrt(off / size) if size else off


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _lost(values: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The squared error of each row or group."""
    return (whole * scales[..., None]).sub_(values).square_().sum(-1)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

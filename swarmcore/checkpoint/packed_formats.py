"""The layouts in which quantised weights are stored, and what they stand for.

A packed weight is several tensors, found by the endings of their names. Shapes say what settings say once
more (bits, sizes of groups), so that layers which differ in them need no rules of their own.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs
import torch

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_INT32 = frozenset({torch.int32})
_BYTES = frozenset({torch.uint8})
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 numbers of 4 bits stand for in ``e2m1``."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of 8 neighbours is among the numbers of a word."""

Tensors = Mapping[str, torch.Tensor]


@attrs.frozen(eq=False)
class Layout:
    """One way of storing a weight: tensors whose names begin alike, and end in these. Equal ones are one."""

    packed: str
    """How the name of the packed tensor ends."""
    plain: str
    """How the name of the weight ends, in the model."""
    dtypes: frozenset[torch.dtype]
    """What packed tensors are in."""
    required: Mapping[str, tuple[str, ...]]
    """The other tensors that belong to it, by what they are to ``unpack``: the endings each may have."""
    unpack: Callable[..., torch.Tensor]
    """From the packed tensor, and the others by keyword, to the plain weight, in float32. Raises `ValueError`
    for shapes and values that do not fit each other."""
    optional: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)

    def find(self, name: str, names: Collection[str]) -> tuple[str, dict[str, str]] | None:
        """The weight's name and those of the other tensors, if ``name`` is a packed one of this layout."""
        if not name.endswith(self.packed):
            return None
        stem = name.removesuffix(self.packed)
        parts: dict[str, str] = {}
        for kind, endings in (*self.required.items(), *self.optional.items()):
            if there := next((stem + ending for ending in endings if stem + ending in names), None):
                parts[kind] = there
            elif kind in self.required:
                return None
        return stem + self.plain, parts


@functools.cache
def scaled(
    dtypes: frozenset[torch.dtype],
    *,
    scales: tuple[str, ...] = ("_scale", "_scale_inv"),
    block: tuple[int | None, int] | None = None,
    zero_points: bool = False,
    four_bits: bool = False,
) -> Layout:
    """8 bits each, times scales of the whole tensor, of rows, or of blocks of so many rows and columns.

    With ``four_bits``, whole numbers are pairs of 4-bit floats, in groups within a row.
    """

    def unpack(
        packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
    ) -> torch.Tensor:
        if four_bits and packed.dtype == torch.int8:
            return _by_group(_fp4(packed.view(torch.uint8)), _scale(scale))
        values = packed.float()
        if zero_point is not None:
            values = values - spread(zero_point.float(), values.shape, block)
        return values * spread(_scale(scale), values.shape, block)

    optional = {"zero_point": ("_zero_point",)} if zero_points else {}
    return Layout("", "", dtypes, {"scale": scales}, unpack, optional)


def spread(
    scale: torch.Tensor, shape: torch.Size, block: tuple[int | None, int] | None = None
) -> torch.Tensor:
    """``scale``, so that it can be multiplied with a weight of ``shape``."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and len(shape) > 1 and scale.shape[0] == shape[0]:
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.dim() != len(shape):
        raise ValueError(f"a scale of shape {list(scale.shape)} does not fit one of {list(shape)}")
    sizes = (None,) * (len(shape) - 2) + (block or (None, None))
    for dim, (rows, groups, size) in enumerate(zip(shape, scale.shape, sizes[-len(shape) :], strict=True)):
        if groups in (1, rows):
            continue
        if not size or -(-rows // size) != groups:
            raise ValueError(f"a scale of shape {list(scale.shape)} does not fit one of {list(shape)}")
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, rows)
    return scale


def _scale(stored: torch.Tensor) -> torch.Tensor:
    """Scales as numbers: those in whole bytes are exponents of 2, the format ``e8m0``."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.float() - 127)
    if not stored.dtype.is_floating_point:
        raise ValueError(f"its scale is in {stored.dtype}")
    return stored.float()


def _by_group(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """``(values - zero) * scale``, each for groups of neighbours within a row."""
    rows, columns = values.shape
    groups = scale.shape[-1]
    if scale.shape != (rows, groups) or columns % groups or (zero is not None and zero.shape != scale.shape):
        raise ValueError(f"scales of shape {list(scale.shape)} do not fit one of {list(values.shape)}")
    grouped = values.float().view(rows, groups, columns // groups)
    if zero is not None:
        grouped = grouped - zero[..., None]
    return (grouped * scale[..., None]).view(rows, columns)


def _numbers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` numbers in each row of words, in which they follow each other without gaps."""
    if sys.byteorder != "little":
        raise ValueError("packed weights are unpacked on little-endian machines only")
    data = words.contiguous().view(torch.uint8)
    if data.shape[-1] * 8 < count * bits:
        raise ValueError(f"{data.shape[-1]} bytes hold no {count} numbers of {bits} bits")
    if bits in (1, 2, 4, 8):
        parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    single = torch.stack([(data >> shift) & 1 for shift in range(8)], -1).flatten(-2)[..., : count * bits]
    places = 2 ** torch.arange(bits, dtype=torch.uint8)
    return (single.view(*data.shape[:-1], count, bits) * places).sum(-1, dtype=torch.uint8)


def _fp4(data: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_FP4)[_numbers(data, 4, 2 * data.shape[-1]).int()]


@functools.cache
def gptq(*, zeros_less_one: bool) -> Layout:
    """Words down the columns; zero points less one, in the first version of the format."""

    def unpack(
        packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        groups, outputs = scales.shape
        bits = zeros.shape[1] * 32 // outputs
        inputs = packed.shape[0] * 32 // bits if g_idx is None else g_idx.numel()
        if bits not in (2, 3, 4, 8) or packed.shape != (-(-inputs * bits // 32), outputs):
            raise ValueError(f"words of shape {list(packed.shape)} and scales of {list(scales.shape)}")
        zero = _numbers(zeros, bits, outputs).int()
        if zeros_less_one:
            if bool((zero == 2**bits - 1).any()):
                raise ValueError("it has zero points that this version of the format cannot hold")
            zero = zero + 1
        if g_idx is None:
            g_idx = torch.arange(inputs) // -(-inputs // groups)
        elif int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise ValueError(f"its g_idx names groups that are not among the {groups} it has")
        index = g_idx.long()
        values = _numbers(packed.t(), bits, inputs)
        return (values - zero.t()[:, index]) * scales.float().t()[:, index]

    others = {"zeros": ("qzeros",), "scales": ("scales",)}
    return Layout("qweight", "weight", _INT32, others, unpack, {"g_idx": ("g_idx",)})


def _unpack_awq(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    inputs, outputs = packed.shape[0], packed.shape[1] * 8

    def columns(words: torch.Tensor) -> torch.Tensor:
        return _numbers(words, 4, outputs).view(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1)

    if scales.shape[1] != outputs or zeros.shape != (len(scales), packed.shape[1]) or inputs % len(scales):
        raise ValueError(f"words of shape {list(packed.shape)} and scales of {list(scales.shape)}")
    return _by_group(columns(packed).t(), scales.float().t(), columns(zeros).float().t())


AWQ = Layout("qweight", "weight", _INT32, {"zeros": ("qzeros",), "scales": ("scales",)}, _unpack_awq)
"""The layout ``gemm``: words along the rows of the transposed weight."""


@functools.cache
def pack_quantized(widths: frozenset[int]) -> Layout:
    """Of compressed-tensors: words along the rows, of numbers of one of these ``widths``, in bits; zero is in
    the middle of their range."""

    def unpack(
        packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor, zero: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, columns = (int(size) for size in shape.tolist())
        fitting = [bits for bits in widths if packed.shape == (rows, -(-columns * bits // 32))]
        if len(fitting) != 1:
            raise ValueError(f"words of shape {list(packed.shape)} for weights of {[rows, columns]}")
        [bits] = fitting
        values = _numbers(packed, bits, columns)
        if zero is not None:
            zero = _numbers(zero.t(), bits, rows).t().float()
        else:
            zero = torch.full(scale.shape, 2.0 ** (bits - 1))
        scales = scale.float()
        if scales.numel() == 1:
            scales, zero = scales.expand(rows, 1), zero.expand(rows, 1)
        return _by_group(values, scales, zero)

    others = {"scale": ("weight_scale",), "shape": ("weight_shape",)}
    return Layout("weight_packed", "weight", _INT32, others, unpack, {"zero": ("weight_zero_point",)})


@functools.cache
def fp4_packed(packed: str, *, inner: str | None = None, multiplied: bool = True) -> Layout:
    """4-bit floats with a scale for each group and, with ``inner``, one for the tensor, by which those are
    ``multiplied`` or divided."""

    def unpack(
        packed: torch.Tensor, scale: torch.Tensor, inner_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = _scale(scale)
        if inner_scale is not None:
            whole = inner_scale.float().reshape(-1)
            if whole.numel() != 1:
                raise ValueError(f"{whole.numel()} scales of the whole tensor")
            scales = scales * whole if multiplied else scales / whole
        values = _fp4(packed)
        flat = _by_group(values.flatten(0, -2), scales.flatten(0, -2))
        return flat.view(values.shape)

    others = {"scale": ("weight_scale",)} | ({"inner_scale": (inner,)} if inner else {})
    return Layout(packed, "weight", _BYTES, others, unpack)


def _unpack_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if packed.dim() < 3 or packed.shape[:-1] != scale.shape or scale.dtype != torch.uint8:
        raise ValueError(f"blocks of shape {list(packed.shape)} and scales of {list(scale.shape)}")
    values = _fp4(packed).mul_(_scale(scale)[..., None]).flatten(-2)
    return values.transpose(-1, -2).contiguous()


MXFP4 = Layout("_blocks", "", _BYTES, {"scale": ("_scales",)}, _unpack_mxfp4)
"""That of gpt-oss: transposed matrices of experts, in blocks of 32 with an exponent each."""


def _unpack_llm_int8(
    packed: torch.Tensor, scale: torch.Tensor, layout: torch.Tensor | None = None
) -> torch.Tensor:
    if layout is not None and bool(layout.ne(0).any()):
        raise ValueError("bitsandbytes has stored it in the order of a kernel, not by rows")
    return packed.float() * spread(_scale(scale) / 127, packed.shape)


LLM_INT8 = Layout(
    "weight",
    "weight",
    frozenset({torch.int8}),
    {"scale": ("SCB",)},
    _unpack_llm_int8,
    {"layout": ("weight_format",)},
)
"""bitsandbytes in 8 bits."""

_STATE_KEYS = frozenset(
    {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
)


def _unpack_bitsandbytes(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    state: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_table: torch.Tensor | None = None,
) -> torch.Tensor:
    settings = _state(state)
    shape, size = torch.Size(settings["shape"]), int(settings["blocksize"])
    count = math.prod(shape)
    data = packed.contiguous().view(torch.uint8).flatten()
    if (
        table.numel() != 16
        or size < 1
        or data.numel() != -(-count // 2)
        or absmax.numel() != -(-count // size)
    ):
        raise ValueError(f"{data.numel()} bytes and {absmax.numel()} scales for weights of {list(shape)}")
    scales = absmax.float().flatten()
    if nested_absmax is not None and nested_table is not None:
        outer = int(settings["nested_blocksize"])
        if nested_table.numel() != 256 or nested_absmax.numel() != -(-absmax.numel() // outer):
            raise ValueError(f"{nested_absmax.numel()} scales for {absmax.numel()} scales")
        scales = nested_table.float()[absmax.flatten().int()]
        scales = scales * nested_absmax.float().repeat_interleave(outer)[: len(scales)]
        scales = scales + float(settings["nested_offset"])
    values = table.float()[torch.stack([data >> 4, data & 15], -1).flatten().int()][:count]
    return values.mul_(scales.repeat_interleave(size)[:count]).view(shape)


def _state(state: torch.Tensor) -> dict[str, Any]:
    """What bitsandbytes writes of a weight, as JSON in the bytes of a tensor."""
    try:
        settings = json.loads(bytes(state.to(torch.uint8).tolist()))
        if unknown := sorted(settings.keys() - _STATE_KEYS):
            raise ValueError(f"bitsandbytes says something unknown of it, {unknown[0]}")
        [int(size) for size in (*settings["shape"], settings["blocksize"])]
    except (TypeError, KeyError, AttributeError) as exc:
        raise ValueError(f"what bitsandbytes says of it is damaged: {exc!r}") from exc
    found: dict[str, Any] = settings
    return found


BITSANDBYTES_4BIT = Layout(
    "weight",
    "weight",
    frozenset({torch.uint8, torch.bfloat16, torch.float16, torch.float32}),
    {
        "absmax": ("weight.absmax",),
        "table": ("weight.quant_map",),
        "state": (
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
        ),
    },
    _unpack_bitsandbytes,
    {"nested_absmax": ("weight.nested_absmax",), "nested_table": ("weight.nested_quant_map",)},
)
"""nf4 and fp4, with scales that may be rounded themselves."""

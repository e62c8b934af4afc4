"""Tensors as lists of floats, for tests without an array library."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from swarmcore.wire.tensors import Tensor

Rows = list[list[float]]


def hidden_states(rows: Sequence[Sequence[float]], dtype: str = "float32") -> Tensor:
    """A tensor ``"hidden"`` of ``[len(rows), width]``."""
    values = [value for row in rows for value in row]
    return tensor_of("hidden", values, (len(rows), len(rows[0]) if rows else 0), dtype)


def tensor_of(name: str, values: Sequence[float], shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
    """A raw tensor of floats; bfloat16 is cut, not rounded."""
    if dtype == "float16":
        data = struct.pack(f"<{len(values)}e", *values)
    elif dtype == "bfloat16":
        data = b"".join(struct.pack("<f", value)[2:] for value in values)
    else:
        data = struct.pack(f"<{len(values)}f", *values)
    return Tensor(name, dtype, shape, memoryview(data))


def read_values(tensor: Tensor) -> list[float]:
    """The values of a tensor of floats, decoded, in C order."""
    raw = tensor.decode().widened()
    return list(struct.unpack(f"<{math.prod(tensor.shape)}f", raw.data))


def read_rows(tensor: Tensor) -> Rows:
    """The values of a tensor of ``[rows, width]``, decoded."""
    values, (count, width) = read_values(tensor), tensor.shape
    return [values[i * width : (i + 1) * width] for i in range(count)]

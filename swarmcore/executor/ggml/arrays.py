"""Wire tensors of floats to numpy arrays and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from swarmcore.errors import InvalidStepError
from swarmcore.executor.ggml.graph_tap import Rows
from swarmcore.wire.tensors import FLOATS, Tensor

LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
"""The largest value of each dtype."""


def to_rows(tensor: Tensor) -> Rows:
    """The values of a wire tensor of floats as float32, exactly, in its own shape; read-only where shared.

    Raise `InvalidStepError` for a dtype that is not a float, and what `Tensor.decode` raises.
    """
    if tensor.dtype not in FLOATS:
        raise InvalidStepError(
            f"tensor {tensor.name!r} is {tensor.dtype}; expected one of {', '.join(FLOATS)}"
        )
    data = tensor.decode().data
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    values = np.frombuffer(data, "<f4" if tensor.dtype == "float32" else "<f2")
    return values.astype(np.float32, copy=False).reshape(tensor.shape)


def to_tensor(name: str, rows: Rows, dtype: str, codec: str = "raw") -> Tensor:
    """Rows as a wire tensor of ``dtype``, rounded to the nearest value, to even at ties.

    None may be above `LARGEST`.
    """
    values: np.ndarray[Any, Any]
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        values = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    else:
        values = np.ascontiguousarray(rows, "<f4" if dtype == "float32" else "<f2")
    tensor = Tensor(name, dtype, rows.shape, values.data.cast("B") if rows.size else memoryview(b""))
    return tensor if codec == "raw" else tensor.encode(codec)

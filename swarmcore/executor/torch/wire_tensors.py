"""Wire tensors to torch tensors and back, sharing memory."""

from __future__ import annotations

import torch

from swarmcore.errors import InvalidStepError
from swarmcore.executor.torch.device import DTYPE_NAMES, DTYPES
from swarmcore.wire.tensors import Tensor


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The values of a wire tensor of floats, on the CPU, in its own dtype and shape.

    Raw tensors share the memory of ``tensor.data`` (copied only when that is read-only). Raise
    `InvalidStepError` for a dtype that is not a float, and what `Tensor.decode` raises.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidStepError(
            f"tensor {tensor.name!r} is {tensor.dtype}; expected one of {', '.join(DTYPES)}"
        )
    data = tensor.decode().data
    if not data.nbytes:
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    # torch warns about read-only memory, and could not keep it read-only.
    buffer = bytearray(data) if data.readonly else data
    return torch.frombuffer(buffer, dtype=dtype).view(tensor.shape)


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor of floats in another dtype, raw. Raise `KeyError` for one that is not a float's."""
    return to_wire(tensor.name, to_torch(tensor).to(DTYPES[dtype]))


def to_wire(name: str, values: torch.Tensor, codec: str = "raw") -> Tensor:
    """A float tensor of any device as a wire tensor; shares its memory if on the CPU, contiguous and raw."""
    values = values.detach().cpu().contiguous()
    shape = tuple(values.shape)
    data = values.view(-1).view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
    tensor = Tensor(name, DTYPE_NAMES[values.dtype], shape, data)
    return tensor if codec == "raw" else tensor.encode(codec)

"""Wire tensors to torch tensors and back, sharing memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swarmcore.errors import InvalidStepError
from swarmcore.executor.torch.device import DTYPES
from swarmcore.wire.tensors import Tensor

WIRE_DTYPES = {**DTYPES, "int8": torch.int8}
"""What attention caches may be kept in."""

WIRE_NAMES = {dtype: name for name, dtype in WIRE_DTYPES.items()}


def to_torch(tensor: Tensor, dtypes: Mapping[str, torch.dtype] = DTYPES) -> torch.Tensor:
    """The values of a wire tensor of floats, or of ``dtypes``, on the CPU, in its own dtype and shape.

    Raw tensors share the memory of ``tensor.data`` (copied only when that is read-only). Raise
    `InvalidStepError` for another dtype, and what `Tensor.decode` raises.
    """
    dtype = dtypes.get(tensor.dtype)
    if dtype is None:
        raise InvalidStepError(
            f"tensor {tensor.name!r} is {tensor.dtype}; expected one of {', '.join(dtypes)}"
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
    """A tensor of floats or int8, of any device, as a wire tensor.

    Shares its memory if it is on the CPU, contiguous and raw.
    """
    values = values.detach().cpu().contiguous()
    shape = tuple(values.shape)
    data = values.view(-1).view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
    tensor = Tensor(name, WIRE_NAMES[values.dtype], shape, data)
    return tensor if codec == "raw" else tensor.encode(codec)

"""The ``int8`` tensor codec for servers without torch: bit for bit that of `swarmcore.executor.torch.codecs`.

Importing this module registers the codec, where torch's own, which is faster, is not there already.
"""

from __future__ import annotations

import math

import numpy as np

from swarmcore.errors import InputError, ProtocolError
from swarmcore.executor.ggml.arrays import LARGEST, to_rows, to_tensor
from swarmcore.executor.ggml.graph_tap import Rows
from swarmcore.wire.tensors import FLOATS, Tensor, codec_names, register_codec

BLOCK = 64


class Int8Codec:
    """Absmax int8 in blocks of 64 values, with a bfloat16 scale for each block before them."""

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raise `InputError` for a dtype that is not a float."""
        if dtype not in FLOATS:
            raise InputError(f"codec int8 takes {', '.join(FLOATS)}, not {dtype}")
        count = math.prod(shape)
        blocks = _blocks(to_rows(Tensor("values", dtype, (count,), data)))
        with np.errstate(all="ignore"):  # what is not finite makes its whole block NaN
            scales = to_tensor("scales", np.abs(blocks).max(1, initial=0) / np.float32(127), "bfloat16")
            divisor = to_rows(scales)[:, None]
            rounded = np.clip(np.rint(np.where(divisor > 0, blocks / divisor, 0)), -127, 127)
            values = rounded.astype(np.int8).reshape(-1)[:count]
        return memoryview(bytes(scales.data) + values.tobytes())

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        count = math.prod(shape)
        cut = self.encoded_nbytes(dtype, shape) - count
        scales = to_rows(Tensor("scales", "bfloat16", (cut // 2,), data[:cut]))
        values = _blocks(np.frombuffer(data[cut:], np.int8).astype(np.float32)) * scales[:, None]
        # A rounded-up scale must not carry the largest values of the dtype over to infinity.
        limit = np.float32(LARGEST[dtype])
        return to_tensor("values", np.clip(values, -limit, limit).reshape(-1)[:count], dtype).data

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        if dtype not in FLOATS:
            raise ProtocolError(f"codec int8 takes {', '.join(FLOATS)}, not {dtype}")
        count = math.prod(shape)
        return count + 2 * -(-count // BLOCK)


def _blocks(values: Rows) -> Rows:
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


if "int8" not in codec_names():
    register_codec("int8", Int8Codec())

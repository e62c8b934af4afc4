"""Servers of ggml and of torch send each other the same bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swarmcore.executor.ggml.arrays import to_rows, to_tensor
from swarmcore.executor.ggml.codecs import Int8Codec
from swarmcore.executor.torch.codecs import Int8Codec as TorchCodec
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 77), (1, 1), (0, 64)])
def test_the_codec_is_that_of_torch(dtype: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(math.prod(shape))
    values = random.standard_normal(shape, dtype=np.float32) * random.choice([0, 1e-3, 1, 6e3], shape[-1:])
    tensor = to_tensor("x", values.astype(np.float32), dtype)
    ours, theirs = Int8Codec(), TorchCodec()
    encoded = ours.encode(tensor.data, dtype, shape)
    assert bytes(encoded) == bytes(theirs.encode(tensor.data, dtype, shape))
    assert encoded.nbytes == ours.encoded_nbytes(dtype, shape)
    assert bytes(ours.decode(encoded, dtype, shape)) == bytes(theirs.decode(encoded, dtype, shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_rounded_as_torch_does(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32)
    values = bits.view(np.float32)[np.isfinite(bits.view(np.float32)) & (np.abs(bits.view(np.float32)) < 6e4)]
    rounded = to_tensor("x", values, dtype)
    expected = to_wire("x", torch.from_numpy(values.copy()).to(getattr(torch, dtype)))
    assert rounded == expected and bytes(rounded.data) == bytes(expected.data)
    assert np.array_equal(to_rows(rounded), to_torch(expected).float().numpy())

from __future__ import annotations

import pytest
import torch

from swarmcore.errors import InputError, ProtocolError
from swarmcore.executor.torch.codecs import BLOCK, Int8Codec
from swarmcore.executor.torch.device import DTYPES
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.wire.tensors import Tensor, codec_names


def round_trip(values: torch.Tensor) -> torch.Tensor:
    wire = to_wire("hidden", values, "int8")
    assert wire.codec == "int8"
    assert wire.data.nbytes == values.numel() + 2 * -(-values.numel() // BLOCK)
    return to_torch(wire)


def block_scales(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude over 127 in each value's block, as bfloat16 rounds it at most."""
    flat = values.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)
    return scale.expand(-1, BLOCK).flatten()[: len(flat)].view(values.shape)


def test_is_registered() -> None:
    assert "int8" in codec_names()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (63,), (64,), (65,), (3, 100), (7, 576), (1030, 64), (2, 3, 5)], ids=str
)
def test_error_is_at_most_half_a_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    values.view(-1)[::37] *= 300  # outliers, as hidden states have
    decoded = round_trip(values)
    assert decoded.dtype == dtype and decoded.shape == values.shape
    rounding = torch.finfo(dtype).eps * values.float().abs()
    assert ((decoded.float() - values.float()).abs() <= 0.5 * block_scales(values) + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.zeros(4 * BLOCK, dtype=dtype)
    values[0], values[1] = limits.max, -limits.max
    values[2 * BLOCK : 3 * BLOCK] = limits.smallest_normal
    decoded = round_trip(values)
    assert decoded.isfinite().all()
    assert torch.equal(decoded[BLOCK : 2 * BLOCK], torch.zeros(BLOCK, dtype=dtype))
    assert (decoded[:2].double().abs() >= 0.98 * limits.max).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_finite(bad: float) -> None:
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 5] = bad
    decoded = round_trip(values)
    assert not decoded[BLOCK : 2 * BLOCK].isfinite().any()
    assert decoded[:BLOCK].isfinite().all() and decoded[2 * BLOCK :].isfinite().all()


def test_empty_tensor() -> None:
    assert round_trip(torch.empty(0, 64)).shape == (0, 64)


def test_large_tensors_are_converted_piece_by_piece() -> None:
    values = torch.randn(300, 1001)  # several chunks, and a short block at the end
    assert torch.equal(round_trip(values).flatten()[: 2 * BLOCK], round_trip(values.flatten()[: 2 * BLOCK]))


def test_zstd_on_top() -> None:
    values = torch.randn(10, 64)
    wire = to_wire("hidden", values, "int8+zstd")
    assert torch.equal(to_torch(wire), round_trip(values))


def test_integers_are_refused() -> None:
    with pytest.raises(InputError, match="int8 takes float32"):
        Int8Codec().encode(memoryview(bytes(8)), "int64", (1,))
    with pytest.raises(ProtocolError, match="int8 takes float32"):
        Tensor("ids", "int64", (1,), memoryview(bytes(8)), "int8").decode()

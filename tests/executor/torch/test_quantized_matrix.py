"""Weights in 8 and 4 bits: what rounding costs, and that a row of a product depends on that row alone."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import linear

from swarmcore.errors import InputError, MissingExtraError, UnsupportedModelError
from swarmcore.executor.torch import quantized_matrix
from swarmcore.executor.torch.quantized_matrix import MATRICES, QuantizedMatrix, choose_weights, matrix_for

CPU = torch.device("cpu")
LOST = {"int8": 0.01, "int4": 0.09, "nf4": 0.1}
"""Share of ordinary weights that rounding takes."""
KINDS = tuple(LOST)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)


def make(kind: str, data: torch.Tensor) -> QuantizedMatrix:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    return MATRICES[kind](data, "a weight")


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (50, 128), (192, 256)])
def test_what_is_left_of_weights(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    data = weight(*shape, dtype)
    data[3] = 0
    matrix = make(kind, data)
    plain = matrix.dense()
    assert plain.shape == data.shape and plain.dtype == dtype
    assert off(plain, data) < LOST[kind]
    assert not plain[3].any(), "zeros stay zeros"
    assert matrix.nbytes <= matrix.bytes_for(*shape, dtype)
    for rows in (1, matrix.kernel_rows, matrix.kernel_rows + 1):
        hidden, bias = torch.randn(1, rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        expected = linear(hidden.float(), plain.float(), bias.float())
        assert off(matrix.multiply(hidden, bias), expected) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_beside_it(kind: str) -> None:
    matrix = make(kind, weight(128, 256))
    rows = torch.randn(matrix.kernel_rows + 8, 256).bfloat16()
    loud = rows.clone()
    loud[1:] *= 1000
    alone = matrix.multiply(rows[:1])
    for count in (2, 3, matrix.kernel_rows, len(rows)):
        beside_loud = matrix.multiply(loud[:count])[:1]
        assert torch.equal(beside_loud, matrix.multiply(rows[:count])[:1]), "what the others are is no matter"
        if matrix._has_kernel and count <= matrix.kernel_rows:
            assert torch.equal(beside_loud, alone), "nor how many they are, up to where kernels change"
        else:
            assert off(beside_loud, alone) < 0.01, "and then it is a matter of rounding"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 200])
def test_gradients_go_through_rounded_weights(kind: str, rows: int) -> None:
    matrix = make(kind, weight(96, 64, torch.float32))
    hidden, gradients = torch.randn(1, rows, 64), torch.randn(1, rows, 96)
    found = []
    for product in (matrix.multiply, lambda given: linear(given, matrix.dense())):
        leaf = hidden.clone().requires_grad_()
        found += torch.autograd.grad(product(leaf), leaf, gradients)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("group", [32, 128])
def test_weights_of_a_grid_of_4_bits_stay_on_it(group: int) -> None:
    """As those of GPTQ and AWQ are: rounding them once more, and worse, would cost quality."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 16, (64, 256 // group, group), generator=generator)
    scales = torch.rand(64, 256 // group, 1, generator=generator) + 0.1
    zeros = torch.randint(4, 12, (64, 256 // group, 1), generator=generator)
    data = ((whole - zeros) * scales).view(64, 256)
    assert off(make("int4", data).dense(), data) < 1e-6
    assert off(make("int4", data.bfloat16()).dense(), data) < 0.01


def test_packed_as_bitsandbytes_packs() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    data = weight(64, 128)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(data, quant_type="nf4", blocksize=64))
    assert off(make("nf4", data).dense(), expected) < 0.003, "but for scales in bfloat16"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_which_nothing_would_be_left(kind: str, value: float) -> None:
    data = weight(64, 64)
    data[5, 7] = value
    with pytest.raises(UnsupportedModelError, match=f"a weight loses .* rounded to {kind}"):
        make(kind, data)


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quantized_matrix, "_verified", set())
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda rows, *others: rows.new_ones(len(rows), 64))
    matrix = make("int8", weight(64, 64))
    assert "int8 kernel" in caplog.text
    rows = torch.randn(2, 64).bfloat16()
    assert torch.equal(matrix.multiply(rows), linear(rows, matrix.dense()))


def test_odd_sizes_are_kept_in_8_bits() -> None:
    assert matrix_for("nf4", 96).kind == "int8"
    assert matrix_for("int4", 48).kind == "int8"
    assert matrix_for("int4", 96).kind == "int4"


def test_what_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_weights("bf16", "int4", CPU) is None
    assert choose_weights("auto", None, CPU) is None
    assert choose_weights("auto", "fp8", CPU) is None
    assert choose_weights("auto", "int4", CPU) == "int4"
    assert choose_weights("auto", "int4", torch.device("cuda")) is None
    with pytest.raises(InputError, match=r"int5.*int4"):
        choose_weights("int5", None, CPU)
    with pytest.raises(InputError, match="on CPUs only"):
        choose_weights("int4", None, torch.device("cuda"))
    monkeypatch.setattr(quantized_matrix, "int4_order", lambda: None)
    with pytest.raises(InputError, match="no int4 kernel for this CPU"):
        choose_weights("int4", None, CPU)
    assert choose_weights("auto", "int4", CPU) is None
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setattr(quantized_matrix, "bitsandbytes", quantized_matrix.Bitsandbytes)
    with pytest.raises(MissingExtraError, match="quant"):
        choose_weights("nf4", None, CPU)

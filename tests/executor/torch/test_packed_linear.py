from __future__ import annotations

import pytest
import torch
from torch import nn

from swarmcore.executor.torch.packed_linear import PackedLinear, pack_linears

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU has no bfloat16 kernels",
)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_packed_weights_compute_the_same(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.Linear(80, 16)).bfloat16().requires_grad_(False)
    inputs = [torch.randn(1, tokens, 48).bfloat16() for tokens in (1, 7, 100)]
    expected = [model(rows) for rows in inputs]
    assert pack_linears(model) == 2
    assert isinstance(model[0], PackedLinear)
    for rows, output in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(rows), output)


@needs_onednn
def test_gradients_go_through_packed_weights() -> None:
    linear = nn.Linear(48, 80).bfloat16().requires_grad_(False)
    rows = torch.randn(2, 7, 48).bfloat16()
    gradients = []
    for module in (linear, PackedLinear(linear)):
        leaf = rows.clone().requires_grad_()
        gradients += torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(*gradients)
    assert not PackedLinear(linear)(rows).requires_grad


def test_float32_and_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8, dtype=torch.bfloat16))
    assert pack_linears(model) == 0

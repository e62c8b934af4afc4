"""Weights in the layout that the CPU's matrix kernels read, converted once instead of at every call.

oneDNN, which multiplies 16-bit matrices on CPUs, has a blocked weight layout of its own. For a few rows at a
time, as in decoding, reading the plain layout takes up to twice as long. The results are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` whose weight is in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            output: torch.Tensor = _PackedProduct.apply(hidden, self.packed, self.bias)  # type: ignore[no-untyped-call]
            return output
        return _multiply(hidden, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _multiply(hidden: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return output


class _PackedProduct(torch.autograd.Function):
    """Its backward takes the weight out of its layout for one product: a copy, which costs far less."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.packed = packed
        return _multiply(hidden, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ ctx.packed.to_dense(), None, None


def pack_linears(model: nn.Module) -> int:
    """Pack the linear layers of a model on the CPU, where that is faster; return how many were packed.

    Each weight is freed as soon as it is packed, so that memory grows by one weight at most.
    """
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Subclasses may compute differently, and experts hold their weights without linear layers.
            if type(child) is nn.Linear and packable(child.weight):
                setattr(module, name, PackedLinear(child))
                packed += 1
    return packed


def packable(weight: torch.Tensor) -> bool:
    """Whether a weight can be packed, and products with it are faster then."""
    if weight.device.type != "cpu":
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(
        weight.dtype
    )
    operators = torch.ops.mkldnn
    # Operators that torch's own compiler relies on, but not public: do without them should they be gone.
    if supported is None or not all(
        hasattr(operators, name) for name in (supported, "_reorder_linear_weight", "_linear_pointwise")
    ):
        return False
    return bool(getattr(operators, supported)())

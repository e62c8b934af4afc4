"""Results in float64 throughout, and how far from them others are: a bound that holds on every CPU.

What float32 costs differs with the model, the inputs and the kernels of a CPU. It is measured, on plain
Transformers, and other ways to the same result may cost a little more of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTOR = 4.0
"""So many times what plain float32 is off may another way be off, which rounds in other places."""


class InFloat64(TorchFunctionMode):
    """Within it, what asks for float32 gets float64, as norms, positions and softmax of Transformers do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wider, args), **named)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def in_float64(model: Any) -> Any:
    """A copy of a model of transformers; its results are exact within `InFloat64`."""
    copied = copy.deepcopy(model).double()
    copied.set_experts_implementation("eager")  # others know 32 bits and fewer
    return copied


def nudged(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Each value is moved by about one rounding: float32 is then off by as much, and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator) * torch.finfo(values.dtype).eps
    return (values.detach() * (1 + noise)).requires_grad_(values.requires_grad)


def error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """How far the one of them that is furthest off is from what it should be, in relation to that."""
    return max(
        ((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)
    )

"""Parameters of a model as one vector, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from swarmcore.errors import InputError

Trained = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
"""A module, all of whose parameters with ``requires_grad`` are meant; or parameters, perhaps with names."""


class ParameterVector:
    """Reads and writes some parameters as one float32 vector on the CPU."""

    def __init__(self, trained: Trained) -> None:
        """Raise `InputError` when there are none, or one is no float parameter."""
        if isinstance(trained, nn.Module):
            trained = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
        named = [
            item if isinstance(item, tuple) else (str(index), item) for index, item in enumerate(trained)
        ]
        if not named:
            raise InputError("there are no trainable parameters: nothing has requires_grad")
        for name, parameter in named:
            if not isinstance(parameter, torch.Tensor) or not parameter.is_floating_point():
                raise InputError(f"parameter {name} is no tensor of floats, and cannot be trained")
        self._parameters = [parameter for _, parameter in named]
        self.count = sum(parameter.numel() for parameter in self._parameters)
        """Values of all parameters together."""
        if not self.count:
            raise InputError("the parameters to train are empty")
        shapes = "\n".join(f"{name} {list(parameter.shape)}" for name, parameter in named)
        self.layout = hashlib.sha256(shapes.encode()).hexdigest()

    def read(self) -> torch.Tensor:
        """A copy of all values."""
        return torch.cat([p.detach().float().cpu().reshape(-1) for p in self._parameters])

    def write(self, values: torch.Tensor) -> None:
        """Set all values, each rounded to its parameter's dtype."""
        with torch.no_grad():
            sizes = [parameter.numel() for parameter in self._parameters]
            for parameter, part in zip(self._parameters, torch.split(values, sizes), strict=True):
                parameter.copy_(part.view(parameter.shape))

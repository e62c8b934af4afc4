"""The layers of a block on quantised weights: linear ones, and experts, each with matrices of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from swarmcore.executor.torch.quantized_matrix import QuantizedMatrix, matrix_for

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Linear layers that choose experts: small, and a choice that is rounded is another one."""
_ALSO_LINEAR = frozenset({"Conv1D", "FalconLinear"})
"""Transformers' own layers that are linear; other subclasses may compute differently."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer."""

    def __init__(self, matrix: QuantizedMatrix, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, None if bias is None else bias.detach()
        self.out_features, self.in_features = matrix.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.matrix.multiply(hidden, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.matrix.kind}"


class QuantizedExperts(nn.Module):
    """In place of the parameter ``[experts, …]`` in which a family keeps the matrices of all its experts.

    The family's own code takes one expert's out of it and multiplies with it; whatever else it does with
    the whole gets plain weights, made for that call. A span with some of the experts of a block would keep
    the matrices of those here, and ask other servers for the rows that are routed to the others.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], transposed: bool) -> None:
        super().__init__()
        self.experts = [Expert(matrix, transposed) for matrix in matrices]
        self.shape = torch.Size([len(matrices), *self.experts[0].shape])
        self.dtype, self.device = matrices[0].dtype, matrices[0].device

    def __getitem__(self, index: int | torch.Tensor) -> Expert:
        return self.experts[int(index)]

    def dense(self) -> torch.Tensor:
        return torch.stack([expert.dense() for expert in self.experts])

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return function(*map(_plain, args), **{key: _plain(value) for key, value in (kwargs or {}).items()})

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.experts[0].matrix.kind}"


class Expert:
    """One expert's matrix, which torch's functions take for a tensor: products are with packed weights."""

    def __init__(self, matrix: QuantizedMatrix, transposed: bool) -> None:
        self.matrix, self.transposed = matrix, transposed
        self.shape = torch.Size(reversed(matrix.shape)) if transposed else matrix.shape

    def dense(self) -> torch.Tensor:
        plain = self.matrix.dense()
        return plain.t() if self.transposed else plain

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if len(args) >= 2 and isinstance(args[0], torch.Tensor) and isinstance(expert := args[1], Expert):
            if function is linear and not expert.transposed:
                return expert.matrix.multiply(args[0], *args[2:], **(kwargs or {}))
            if function in products and expert.transposed:
                return expert.matrix.multiply(args[0])
        return function(*map(_plain, args), **{key: _plain(value) for key, value in (kwargs or {}).items()})


def quantize(block: nn.Module, kind: str, name: str) -> None:
    """Replace the weights of a block's products, one by one, so that each is freed once it is rounded.

    Raise `UnsupportedModelError` for one that cannot be, by the ``name`` of the block.
    """
    for path, module, attribute in list(_weights(block)):
        where = f"{attribute} in {path} of {name}"
        weight = module.get_parameter(attribute).detach()
        transposed = _is_transposed(module)
        if weight.dim() == 2:
            bias: Any = module.bias
            matrix = _rounded(weight.t() if transposed else weight, kind, where)
            block.set_submodule(path, QuantizedLinear(matrix, bias))
        else:
            parts = [_rounded(part.t() if transposed else part, kind, where) for part in weight]
            del module._parameters[attribute]
            setattr(module, attribute, QuantizedExperts(parts, transposed))


def _rounded(weight: torch.Tensor, kind: str, where: str) -> QuantizedMatrix:
    return matrix_for(kind, weight.shape[1])(weight, where)


def quantized_nbytes(block: nn.Module, kind: str, dtype: torch.dtype) -> int:
    """What the block takes after `quantize`, on the high side. It may be without memory (``meta``)."""
    total = sum(parameter.numel() * dtype.itemsize for parameter in block.parameters())
    for _, module, attribute in _weights(block):
        weight = module.get_parameter(attribute)
        *count, rows, columns = weight.shape
        if _is_transposed(module):
            rows, columns = columns, rows
        each = matrix_for(kind, columns).bytes_for(rows, columns, dtype)
        total += (count[0] if count else 1) * each - weight.numel() * dtype.itemsize
    return total


def _weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """What is kept in fewer bits: path and module of what holds the weights, and their names in there."""
    for path, module in block.named_modules():
        if type(module) is nn.Linear or type(module).__name__ in _ALSO_LINEAR:
            if path.rpartition(".")[2] not in _ROUTERS:
                yield path, module, "weight"
        elif "Experts" in type(module).__name__:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield path, module, name


def _is_transposed(module: nn.Module) -> bool:
    """Whether its weights are ``[in, out]``."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))


def _plain(value: Any) -> Any:
    return value.dense() if isinstance(value, QuantizedExperts | Expert) else value

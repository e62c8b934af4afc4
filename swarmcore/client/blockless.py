"""A checkpoint's model without a single block: what of it the client owns, in the family's own classes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.executor.torch.checkpoint.base import missing_tensors
from swarmcore.executor.torch.checkpoint.quiet import quiet_transformers
from swarmcore.executor.torch.device import choose_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from swarmcore.executor.torch.checkpoint import Checkpoint, Progress

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
"""Names that families give to the norm between the last block and the head."""

_PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Lists in a config that must have one entry for each layer."""

_BLOCK_TENSOR = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")

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
) -> PreTrainedModel:
    """Embeddings, final norm and head of ``checkpoint``; nothing else is read. Frozen, in evaluation mode.

    ``settings`` are put into the config first. A head that the checkpoint does not have, as of a classifier
    that is yet to be trained, is initialised as Transformers does, and can be trained. Raise `InputError`
    for an unknown dtype, `CheckpointError` when a tensor is missing or has the wrong shape,
    `UnsupportedModelError` when ``build`` has no ``what`` of this family.
    """
    config = without_blocks(checkpoint.config)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    own = config if getattr(config, "dtype", None) is not None else checkpoint.config
    wanted = choose_dtype(dtype, own, torch.device("cpu"))
    with quiet_transformers(lambda share: None):
        try:
            with torch.device("meta"):
                skeleton = build(config)
        except (ValueError, KeyError, AttributeError, TypeError) as exc:
            raise UnsupportedModelError(
                f"{checkpoint.name} ({config.model_type}) is no {what} that transformers can build: {exc}"
            ) from exc
        found = _find_tensors(skeleton, checkpoint.names())
        tensors = checkpoint.read(list(found), progress=progress)
        state = {key: tensors.pop(name).to(wanted) for name, key in found.items()}
        try:
            model, loaded = type(skeleton).from_pretrained(
                None, config=config, state_dict=state, dtype=wanted, output_loading_info=True
            )
        except (RuntimeError, ValueError) as exc:
            raise CheckpointError(f"the tensors of {checkpoint.name} do not fit its config: {exc}") from exc
    new = {name for name in loaded["missing_keys"] if _is_new_head(model, name)}
    if missing := set(loaded["missing_keys"]) - new:
        raise missing_tensors(checkpoint.name, missing)
    model.eval().requires_grad_(False)
    for name in new:
        model.get_parameter(name).requires_grad_(True)
    return model


def final_norm(model: PreTrainedModel) -> str:
    """The name of the norm between the last block and the head, in the base model of ``model``.

    Raise `UnsupportedModelError` when there is none of a known name.
    """
    base = model.base_model
    name = next((n for n in _FINAL_NORMS if isinstance(getattr(base, n, None), nn.Module)), None)
    if name is None or base is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no final norm of a known name before its head"
        )
    return name


def without_blocks(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the text model's config with no layers."""
    config = copy.deepcopy(config.get_text_config(decoder=True))
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


def _find_tensors(skeleton: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """Which tensors of the checkpoint to read, and the name to load each under."""
    candidates = {name for name in names if not _BLOCK_TENSOR.search(name)}
    prefix = f"{skeleton.base_model_prefix}."
    found: dict[str, str] = {}
    for key in skeleton.state_dict():
        # Some checkpoints are of the base model alone, some of a larger model around the text model.
        forms = (key, key.removeprefix(prefix))
        nested = (name for name in sorted(candidates) if name.endswith(tuple(f".{form}" for form in forms)))
        match = next((name for name in (*forms, *nested) if name in candidates), None)
        if match is not None:
            found[match] = key
    wanted = {key for key, _ in skeleton.named_parameters() if not _is_new_head(skeleton, key)}
    if not wanted <= set(found.values()):
        # Old names of this family, which transformers itself will translate.
        found |= {name: name for name in candidates if name not in found}
    return found

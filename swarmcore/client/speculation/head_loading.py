"""Draft heads out of checkpoints: the model's own layer for one token further (MTP), and EAGLE's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.base import missing_tensors
from swarmcore.checkpoint.quantized import unexpected_tensors
from swarmcore.client.speculation.draft_heads import DraftHead
from swarmcore.errors import InputError, UnsupportedModelError
from swarmcore.executor.torch.device import choose_dtype
from swarmcore.executor.torch.partial_model import build_on_meta, load_state, misshapen, whole_config

MTP_FAMILIES = ("deepseek_v3", "glm4_moe")
"""Those whose layer for one token further is a block of their later kind, named as DeepSeek-V3 names it."""
EAGLE_FAMILIES = ("llama", "mistral", "qwen2")
"""What the block of an EAGLE head may be of."""

_SHARED = {"embed_tokens.weight", "shared_head.head.weight", "lm_head.weight"}
"""Copies of the model's embeddings and output layer."""
_PLACEHOLDERS = {"model.embed_tokens.weight", "lm_head.weight"}
"""What a model of one block has besides, and a head does not use."""
_EAGLE_3 = re.compile(r"(^|\.)(midlayer|d2t|t2d|fc_norm|hidden_norm)(\.|$)")
_BESIDE_FAMILY = {"bias", "draft_vocab_size", "_name_or_path", "architectures", "transformers_version"}
"""Keys of an EAGLE head's config that its block's family does not have."""


def load_mtp_head(checkpoint: Checkpoint, *, dtype: str = "auto") -> DraftHead:
    """The layer by which the model itself was trained to predict one token further.

    Given its own guesses it drafts any number of tokens. Raise `InputError` for a model that brings none,
    `UnsupportedModelError` for heads that are not understood, `CheckpointError` for tensors that are missing
    or of another shape.
    """
    name, config = checkpoint.name, checkpoint.config.get_text_config(decoder=True)
    layers = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    prefix = f"model.layers.{config.num_hidden_layers}."
    names = {each: each.removeprefix(prefix) for each in checkpoint.names() if each.startswith(prefix)}
    others = [each for each in checkpoint.names() if re.match(r"(model\.)?(mtp|nextn)\w*\.", each)]
    if config.model_type not in MTP_FAMILIES and (names or others or layers):
        raise UnsupportedModelError(
            f"{name} has draft heads as models of type {config.model_type!r} have them, which is not known; "
            f"those of {' and '.join(MTP_FAMILIES)} are"
        )
    if not layers or not names:
        raise InputError(f"{name} brings no draft heads; name a draft model instead")
    if layers > 1:
        raise UnsupportedModelError(
            f"{name} has num_nextn_predict_layers {layers}; heads of one such layer are known"
        )
    found, size = _read(checkpoint, names), int(config.hidden_size)
    shapes = {f"{each}.weight": (size,) for each in ("enorm", "hnorm", "shared_head.norm")}
    joint = _take(name, found, {**shapes, "eh_proj.weight": (size, 2 * size)})
    block = _one_block(config)
    block.first_k_dense_replace = 0
    state = {f"model.layers.0.{key}": tensor for key, tensor in found.items()}
    state["model.norm.weight"] = joint["shared_head.norm.weight"]
    wanted = choose_dtype(dtype, config, torch.device("cpu"))
    base = _load(name, block, state, wanted)
    norm, eps = type(base.norm), config.rms_norm_eps
    entrance = _Entrance(joint["eh_proj.weight"], wanted, norm(size, eps), norm(size, eps))
    with torch.no_grad():
        entrance.of_embedding.weight.copy_(joint["enorm.weight"])
        entrance.of_hidden.weight.copy_(joint["hnorm.weight"])
    return DraftHead(entrance.to(wanted), base, wanted)


def load_eagle_head(
    checkpoint: Checkpoint, hidden_size: int, vocab_size: int, *, dtype: str = "auto"
) -> DraftHead:
    """An EAGLE head, a checkpoint of its own, for a model of this size.

    Raise `UnsupportedModelError` for EAGLE-3, which needs what inner blocks made, and all else that is not
    understood; `CheckpointError` for tensors that are missing or of another shape.
    """
    name, config = checkpoint.name, checkpoint.config
    names = {each: each.removeprefix("model.") for each in checkpoint.names()}
    _check_eagle(checkpoint, names.values())
    if config.hidden_size != hidden_size:
        raise UnsupportedModelError(
            f"{name} is a head for hidden states of {config.hidden_size}, and the model has {hidden_size}"
        )
    if config.vocab_size != vocab_size:
        raise UnsupportedModelError(
            f"{name} is a head for {config.vocab_size} tokens, and the model has {vocab_size}"
        )
    found = _read(checkpoint, names)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden_size, 2 * hidden_size)}
    if "fc.bias" in found:
        shapes["fc.bias"] = (hidden_size,)
    joint = _take(name, found, shapes)
    wanted = choose_dtype(dtype, config, torch.device("cpu"))
    state = {f"model.{key}": tensor for key, tensor in found.items()}
    left_out = {"model.norm.weight", "model.layers.0.input_layernorm.weight"}
    base = _load(name, _one_block(config), state, wanted, left_out)
    base.norm = base.layers[0].input_layernorm = nn.Identity()
    return DraftHead(_Entrance(joint["fc.weight"], wanted, bias=joint.get("fc.bias")), base, wanted)


def is_eagle(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is an EAGLE head, of any kind, rather than a whole model."""
    architectures = " ".join(checkpoint.raw_config.get("architectures") or ())
    return "eagle" in architectures.lower() or any(
        re.fullmatch(r"(model\.)?fc\.weight", each) or _EAGLE_3.search(each) for each in checkpoint.names()
    )


class _Entrance(nn.Module):
    """Puts a token's embedding and a hidden state together: ``[1, tokens, hidden size]`` of each."""

    def __init__(
        self,
        weight: torch.Tensor,
        dtype: torch.dtype,
        of_embedding: nn.Module | None = None,
        of_hidden: nn.Module | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.of_embedding: Any = of_embedding or nn.Identity()
        self.of_hidden: Any = of_hidden or nn.Identity()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.of_embedding(embedded), self.of_hidden(hidden)], dim=-1)
        return nn.functional.linear(joined, self.weight, self.bias)


def _check_eagle(checkpoint: Checkpoint, names: Collection[str]) -> None:
    name, config, raw = checkpoint.name, checkpoint.config, checkpoint.raw_config
    architectures = " ".join(raw.get("architectures") or ())
    if "eagle3" in architectures.lower() or any(_EAGLE_3.search(each) for each in names):
        raise UnsupportedModelError(
            f"{name} is an EAGLE-3 head: it reads what inner blocks of the model made, which servers do not "
            f"send; EAGLE (1 and 2) heads are known"
        )
    if config.model_type not in EAGLE_FAMILIES or config.num_hidden_layers != 1:
        raise UnsupportedModelError(
            f"{name} has {config.num_hidden_layers} blocks of type {config.model_type!r}; known are EAGLE "
            f"heads of one block of {', '.join(EAGLE_FAMILIES)}"
        )
    family = type(config)().to_dict().keys() | _BESIDE_FAMILY | {"torch_dtype", "rope_theta", "rope_scaling"}
    if unknown := sorted(raw.keys() - family):
        raise UnsupportedModelError(f"the config of {name} has {', '.join(unknown)}, which is not known")
    if raw.get("draft_vocab_size") not in (None, config.vocab_size):
        raise UnsupportedModelError(
            f"{name} has draft_vocab_size {raw['draft_vocab_size']}: it drafts a part of the vocabulary "
            f"only, which is not known"
        )


def _read(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors under their short names, without those that the model has as well."""
    wanted = {name: short for name, short in names.items() if short not in _SHARED}
    return {wanted[name]: tensor for name, tensor in checkpoint.read(list(wanted)).items()}


def _take(
    name: str, found: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Take these out of ``found``."""
    if missing := shapes.keys() - found.keys():
        raise missing_tensors(name, missing)
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise misshapen(name, key, found[key].shape, torch.Size(shape))
    return {key: found.pop(key) for key in shapes}


def _one_block(config: Any) -> Any:
    block = whole_config(config)
    block.num_hidden_layers = 1
    if getattr(block, "layer_types", None):
        block.layer_types = block.layer_types[-1:]
    return block


def _load(
    name: str,
    config: Any,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    left_out: Collection[str] = (),
) -> Any:
    """The base model of one block; of its tensors those ``left_out`` may not be there, and no others."""
    if there := state.keys() & left_out:
        raise unexpected_tensors(name, there)
    model, report = load_state(type(build_on_meta(config)), config, state, dtype, name)
    for key, shape, expected in report.get("mismatched_keys", ()):
        raise misshapen(name, key, shape, expected)
    if unexpected := report["unexpected_keys"]:
        raise unexpected_tensors(name, unexpected)
    if missing := set(report["missing_keys"]) - _PLACEHOLDERS - set(left_out):
        raise missing_tensors(name, missing)
    return model.base_model

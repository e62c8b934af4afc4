"""Which tensors of a checkpoint belong to its text model, and what of them nobody has a place for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch

from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import CheckpointError
from swarmcore.executor.torch.structure import Structure

_OTHER_TOWERS = re.compile(
    r"vision|visual|image|audio|video|speech|encoder|projector|perceiver|resampler|connector|talker|mtp|nextn"
)
_OTHER_HEADS = re.compile(r"(^|\.)(score|classifier|v_head|value_head|reward_head|summary|pooler|mtp\w*)\.")
"""Heads for other purposes, and blocks that only guess further tokens: transformers leaves them out, too."""

_COMPUTED = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids)$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|mask|causal_mask)$")


def text_tower(checkpoint: Checkpoint, structure: Structure) -> str:
    """What the names of the text model's tensors begin with, such as ``model.language_model.``.

    Where the model's class has them if there are such, whatever is beside them (another copy of the model);
    else where most blocks are. Raise `CheckpointError` when there are none.
    """
    layers = structure.layers
    pattern = re.compile(rf"(.*\.)?{layers}\.\d+\..+")
    towers: dict[str, int] = {}
    for name in checkpoint.names():
        if (match := pattern.fullmatch(name)) and not _OTHER_TOWERS.search(match[1] or ""):
            towers[match[1] or ""] = towers.get(match[1] or "", 0) + 1
    if not towers:
        raise CheckpointError(f"{checkpoint.name} has no tensors named {layers}.0.… for its blocks")
    if f"{structure.base}." in towers:
        return f"{structure.base}."
    return max(towers, key=lambda tower: towers[tower])


@attrs.frozen
class TextTensors:
    """The tensors of a checkpoint that are in none of its blocks, as the client needs them."""

    names: frozenset[str]
    tower: str
    composite: bool
    """Whether the text model is part of a larger one, whose other parts are in the checkpoint too."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, structure: Structure) -> TextTensors:
        """Raise `CheckpointError` when the checkpoint has no blocks."""
        block = re.compile(rf"(^|\.)({structure.layers}|layers|h|blocks)\.\d+\.")
        config = checkpoint.config
        return cls(
            frozenset(name for name in checkpoint.names() if not block.search(name)),
            text_tower(checkpoint, structure),
            config.get_text_config(decoder=True) is not config,
        )

    def find(self, keys: Collection[str], base: str) -> dict[str, str]:
        """The tensors to read for the ``keys`` of a model, and the key of each.

        What is in the module at ``base``, which owns the blocks, is where the blocks are; a head is beside
        that, or on a level above.
        """
        found: dict[str, str] = {}
        levels = [
            self.tower[:end] for end in range(len(self.tower), -1, -1) if self.tower[:end][-1:] in ("", ".")
        ]
        for key in keys:
            inside = key.removeprefix(f"{base}.")
            short = key.removeprefix(f"{base.partition('.')[0]}.")
            beside = [level + form for level in levels for form in dict.fromkeys((key, short))]
            forms = [self.tower + inside] if inside != key else beside
            if match := next((name for name in (*forms, key) if name in self.names), None):
                found[match] = key
        return found

    def of_use(self, names: Collection[str]) -> set[str]:
        """Those of ``names`` that no model computes itself, and that are of no part that is left out."""
        return {
            name
            for name in names
            if not is_computed(name) and not is_of_another_part(name.removeprefix(self.tower))
        }

    def unexpected(self, names: Collection[str], found: Collection[str], model: Any) -> set[str]:
        """Those of ``names``, for which ``model`` has no place, that are of the text model all the same.

        ``found`` are the tensors for which it has one.
        """
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        modules = {name.rpartition(".")[0] for name in found} - {""}
        named = self.composite and re.search(r"language|text|decoder", self.tower) is not None
        # A classifier leaves out the head for words.
        whole = not self.composite and model.get_output_embeddings() is not None

        def ours(name: str) -> bool:
            if any(name.startswith(f"{module}.") for module in modules):
                return True  # beside a tensor that was found: a bias, a scale
            return name.startswith(self.tower) if named else whole

        return {
            name
            for name in self.of_use(names)
            if ours(name) and not any(pattern.search(name) for pattern in ignored)
        }

    def whole_numbers(self, found: Mapping[str, str], model: Any) -> set[str]:
        """The tensors in ``found`` that are whole numbers by their nature."""
        kept = model.state_dict()
        return {name for name, key in found.items() if key in kept and not kept[key].is_floating_point()}


def is_computed(name: str, data: torch.Tensor | None = None) -> bool:
    """Whether the tensor is one that models compute themselves: rotary frequencies, causal masks.

    Old checkpoints have them. A mask is told from a bias by the shape of ``data``.
    """
    if _COMPUTED.search(name):
        return True
    if data is None or data.dim() < 2 or not _MASK.search(name):
        return False
    return data.shape[-1] == data.shape[-2]


def is_of_another_part(name: str) -> bool:
    """Whether the tensor is of a tower for images or sounds, or of a head that is not used here."""
    return bool(_OTHER_TOWERS.search(name) or _OTHER_HEADS.search(name))


def whole_numbers(tensors: Mapping[str, torch.Tensor], known: Collection[str]) -> set[str]:
    """Those of ``tensors`` that ``known`` names of a model's own whole numbers end with."""
    return {name for name in tensors if any(name.endswith(key) for key in known)}

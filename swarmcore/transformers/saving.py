"""What `save_pretrained` keeps of a remote model: the parts here that can be trained, and whose they are.

``model.safetensors`` has them under the names that they have in the model, which is also how
Transformers' ``Trainer`` reads its checkpoints; ``remote_model.json`` says what they were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from swarmcore.checkpoint.storage import save_file
from swarmcore.errors import CheckpointError, InputError, ModelMismatchError
from swarmcore.types import JsonDict, ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "remote_model.json"
TENSORS = "model.safetensors"

_HEAD_SETTINGS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Of a classifier's config, what is not the language model's."""


@attrs.frozen
class _Description:
    model: str
    """What the model was loaded from."""
    fingerprint: str
    config: JsonDict


@attrs.frozen
class SavedParts:
    """Trained parts in a folder."""

    model: str
    """What the model is loaded from."""
    fingerprint: str
    config: dict[str, Any]
    """What is put into its config."""
    folder: Path

    def put_into(self, model: PreTrainedModel, info: ModelInfo) -> None:
        """Give ``model`` these parts; they can be trained further.

        Raise `ModelMismatchError` when they were trained on other weights, `CheckpointError` when they do not
        fit.
        """
        if info.fingerprint != self.fingerprint:
            raise ModelMismatchError(
                f"what is in {self.folder} was trained on {self.model} with the fingerprint "
                f"{self.fingerprint[:12]}; the model of that name now has {info.fingerprint[:12]}"
            )
        try:
            tensors = load_file(self.folder / TENSORS)
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"{self.folder / TENSORS} cannot be read: {exc}") from exc
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{self.folder} has {name} of shape {list(tensor.shape)}, which a {type(model).__name__} "
                    f"has not: load it with the automatic class that it was saved of"
                )
            with torch.no_grad():
                parameters[name].copy_(tensor)
            parameters[name].requires_grad_(True)


def save_parts(
    model: PreTrainedModel, info: ModelInfo, folder: Path, state: Mapping[str, torch.Tensor] | None
) -> None:
    """Write the parameters of ``model`` that can be trained, with their values in ``state`` if given.

    Raise `InputError` when there are none, `StorageError` when the disk refuses.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "there is nothing to save: the blocks are the servers', and no parameter here can be trained; "
            "thaw what you train with requires_grad_(), and save prompts and adapters with their own save()"
        )
    config = model.config
    settings = {} if model.can_generate() else {name: getattr(config, name, None) for name in _HEAD_SETTINGS}
    about = _Description(config._name_or_path, info.fingerprint, settings)
    save_trained(model, folder, state)
    save_file(folder / DESCRIPTION, msgspec.json.format(msgspec.json.encode(about)))


def save_trained(model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor] | None) -> None:
    """Write the parameters of ``model`` that can be trained, under their names in it."""
    tensors = {
        name: (parameter if state is None or name not in state else state[name]).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(folder / TENSORS, save(tensors, metadata={"format": "pt"}))


def read_saved_parts(folder: Path) -> SavedParts | None:
    """What `save_parts` wrote there, but for the tensors; None when it is no such folder.

    Raise `CheckpointError` for a damaged description.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        about = msgspec.json.decode(path.read_bytes(), type=_Description)
    except (OSError, msgspec.DecodeError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    config = dict(about.config)
    if isinstance(config.get("id2label"), dict):
        config["id2label"] = {int(key): label for key, label in config["id2label"].items()}
    return SavedParts(about.model, about.fingerprint, config, folder)

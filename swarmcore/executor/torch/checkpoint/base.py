"""What a checkpoint is, whatever it is kept in: a config, small files, and tensors that are read by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from swarmcore.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from swarmcore.executor.torch.checkpoint.cache import storage_errors
from swarmcore.executor.torch.checkpoint.progress import Progress
from swarmcore.imports import import_large
from swarmcore.types import JsonDict, ModelInfo

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(ABC):
    """A model's config and tensors. Made by `open_checkpoint`; nothing is loaded until it is asked for.

    All methods block (disk, network): call them in a thread. They may be called from several threads.
    """

    name: str
    """What people call the model: the hub id, or the name of the folder or file."""
    folder: Path
    """Local folder with config.json, the tokenizer's files and generation_config.json."""
    config: PretrainedConfig
    info: ModelInfo

    @abstractmethod
    def names(self) -> Collection[str]:
        """The names of all tensors, as they are in the checkpoint (a tied head is absent)."""

    @abstractmethod
    def nbytes(self, names: Collection[str]) -> int:
        """How many bytes these tensors take in the checkpoint.

        Raise `CheckpointError` when one is missing.
        """

    @abstractmethod
    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """These tensors, on the CPU, in the checkpoint's own dtype; only their bytes are read or downloaded.

        Raise `CheckpointError` when one is missing or the files are damaged, `StorageError` when the disk
        is full, `ModelHubError` when a download cannot be finished (what was read is kept).
        """

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.info.fingerprint[:12]} · {self.info.blocks} blocks>"


def load_config(folder: Path, name: str) -> tuple[PretrainedConfig, JsonDict]:
    """The config in ``folder``, as transformers has it and as it is. Code that comes with it is never run."""
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{name} has no config.json: it is not a model in the transformers format")
    raw = read_json(folder / "config.json")
    import_large("transformers.models.auto.configuration_auto")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True), raw
    except (ValueError, KeyError) as exc:
        raise UnsupportedModelError(f"transformers does not know what {name} is: {one_line(exc)}") from exc
    except Exception as exc:  # each family checks its config in its own way
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(exc)}") from exc


def read_json(path: Path) -> JsonDict:
    with storage_errors("reading the model", path):
        content = path.read_bytes()
    try:
        return msgspec.json.decode(content, type=JsonDict)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path} is damaged: {exc}") from exc


def describe(name: str, config: PretrainedConfig, fingerprint: str) -> ModelInfo:
    """What is announced of a model."""
    text = config.get_text_config(decoder=True)
    try:
        return ModelInfo(name, fingerprint, int(text.num_hidden_layers), int(text.hidden_size))
    except (AttributeError, TypeError) as exc:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) is not a model of transformer blocks"
        ) from exc


def one_line(exc: BaseException) -> str:
    """What a foreign exception says, for use within a message."""
    return " ".join(str(exc).split()) or type(exc).__name__


def missing_tensors(name: str, missing: Collection[str]) -> CheckpointError:
    some = ", ".join(sorted(missing)[:3]) + (", …" if len(missing) > 3 else "")
    return CheckpointError(
        f"{name} has no tensor {some}: the checkpoint is incomplete, or of another architecture"
    )

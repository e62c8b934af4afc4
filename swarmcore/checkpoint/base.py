"""What a checkpoint is, whatever it is kept in: a config, small files, and tensors that are read by name."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from swarmcore.checkpoint.location import INDEX, LFS_POINTER, WEIGHTS, lfs_pointer
from swarmcore.checkpoint.storage import storage_errors
from swarmcore.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from swarmcore.imports import import_large
from swarmcore.types import JsonDict, ModelInfo, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from swarmcore.checkpoint.gguf_model import GgufModel


ADAPTER = "adapter_config.json"
"""Of PEFT: says that the weights beside it are an adapter's."""


class Checkpoint(ABC):
    """A model's config and tensors. Made by `open_checkpoint`; nothing is loaded until it is asked for.

    All methods block (disk, network): call them in a thread. They may be called from several threads.
    """

    name: str
    """What people call the model: the hub id, or the name of the folder or file."""
    folder: Path
    """Local folder with config.json, the tokenizer's files and generation_config.json."""
    config: PretrainedConfig
    raw_config: JsonDict
    """What config.json says, as it is there."""
    info: ModelInfo
    stored_weights: str | None = None
    """What its weights are packed in, by the name that executors have for the same (``"int4"``), else by the
    method's; None when they are plain. What is read is plain in any case."""
    gguf: GgufModel | None = None
    """The GGUF that it is read from, or was converted from."""

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

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor of real numbers in the checkpoint; None when that is not known."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.info.fingerprint[:12]} · {self.info.blocks} blocks>"


def load_config(folder: Path, name: str) -> tuple[PretrainedConfig, JsonDict]:
    """The config in ``folder``, as transformers has it and as it is. Code that comes with it is never run."""
    if (folder / ADAPTER).is_file():
        raise _adapter(folder, name)
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{name} has no config.json: it is not a model in the transformers format")
    raw = read_json(folder / "config.json")
    import_large("transformers.models.auto.configuration_auto")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as exc:
        raise UnsupportedModelError(f"transformers does not know what {name} is: {one_line(exc)}") from exc
    except Exception as exc:  # each family checks its config in its own way
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(exc)}") from exc
    if (file := raw.get("transformers_weights")) not in (None, WEIGHTS, INDEX):
        raise UnsupportedModelError(
            f"the config of {name} names {file} for its weights (transformers_weights); call it {WEIGHTS}"
        )
    return config, raw


def _adapter(folder: Path, name: str) -> UnsupportedModelError:
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "its base model"
    return UnsupportedModelError(
        f"{name} holds a PEFT adapter ({ADAPTER}), which transformers would put on top of the weights; name "
        f"{base} as the model and load the adapter on its own, or merge it (PEFT's merge_and_unload)"
    )


def read_json(path: Path) -> JsonDict:
    """The object in a JSON file, as Python's own reader has it: what it writes may say Infinity and NaN."""
    with storage_errors("reading the model", path):
        content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is damaged: {exc}") from exc
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return found


def settle_dtype(checkpoint: Checkpoint) -> None:
    """Make the config name the dtype of the weights: that of the whole model, else the one they are in.

    As transformers has it for ``dtype="auto"``. Configs of older models, and those of the text part of a
    larger model, often name none.
    """
    config = checkpoint.config
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        if _is_packed(getattr(part, "dtype", None)):
            part.dtype = None
    if getattr(text, "dtype", None) is None:
        stored = getattr(config, "dtype", None) or checkpoint.stored_dtype()
        if not _is_packed(stored):
            text.dtype = stored


def _is_packed(dtype: object) -> bool:
    """Whether weights are kept in it, and nobody computes in it."""
    import torch

    return isinstance(dtype, torch.dtype) and (dtype.itemsize == 1 or not dtype.is_floating_point)


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

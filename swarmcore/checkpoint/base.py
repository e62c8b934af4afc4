"""What a checkpoint is, whatever it is kept in: a config, small files, and tensors that are read by name."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, get_ident
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from swarmcore.errors import CheckpointError, ModelNotFoundError, StorageError, UnsupportedModelError
from swarmcore.imports import import_large
from swarmcore.types import JsonDict, ModelInfo, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig


log = logging.getLogger(__name__)


def cache_folder(cache_dir: Path | None = None) -> Path:
    """``cache_dir``, or ``$SWARMCORE_CACHE``, or ``~/.cache/swarmcore``. It need not exist yet.

    Raise `StorageError` where that is in the home of somebody who has none.
    """
    folder = cache_dir or os.environ.get("SWARMCORE_CACHE")
    try:
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "swarmcore"
    except RuntimeError as exc:
        raise StorageError(
            f"there is no place for the model cache ({exc}); set SWARMCORE_CACHE to a folder"
        ) from exc


def gigabytes(size: int) -> str:
    """A size as people read it: ``1.5 GB``, ``269 MB``, ``12 bytes``."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size // factor} {unit}"
    return f"{size} bytes"


@contextmanager
def storage_errors(doing: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Translate the operating system's refusals into `StorageError`, with the cause and the cure."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(doing, path, needed) from exc
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission for {doing}: {exc.filename or path}; mend its permissions, or set "
                f"SWARMCORE_CACHE to a folder that you may write to"
            ) from exc
        raise StorageError(f"{doing} failed: {exc.strerror or exc}: {exc.filename or path}") from exc


def disk_full(doing: str, path: Path, needed: int = 0) -> StorageError:
    free = free_bytes(path)
    wants = f"needs {gigabytes(needed)}, " if needed else ""
    return StorageError(
        f"the disk is full: {doing} {wants}{gigabytes(free)} is free at {path}; free some space, or set "
        f"SWARMCORE_CACHE to a folder on a larger disk",
        needed=needed,
        free=free,
    )


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds ``path``, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_room(doing: str, path: Path, needed: int) -> None:
    """Raise `StorageError` when the disk of ``path`` has less than ``needed`` bytes free."""
    if needed > free_bytes(path):
        raise disk_full(doing, path, needed)


@contextmanager
def locked(target: Path, cache: Path, waiting: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of ``target`` among all processes that use this cache folder.

    Waits for as long as another process holds it, calling ``progress(waiting, 0, 0)`` every second. The
    operating system drops the lock of a process that dies.
    """
    key = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:32]
    path = cache / "locks" / f"{key}.lock"
    with storage_errors("creating a lock file", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while True:
            try:
                lock.acquire(timeout=1, poll_interval=0.05)
                break
            except Timeout:
                progress(waiting, 0, 0)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends well, and else is removed.

    The caller holds the lock of ``target``: what an earlier process left behind is removed first.
    """
    part = target.with_name(f".{target.name}.part")
    with storage_errors("creating a folder", part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        yield part
        with storage_errors("renaming a folder", target):
            part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a small file all or nothing. Raise `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git checked out without its content, where git-lfs is not installed."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


def lfs_pointer(file: Path | str) -> CheckpointError:
    """The error for a file that is only a git-lfs pointer."""
    return CheckpointError(
        f"{file} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in its "
        f"folder, or download the model with `hf download`"
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


def no_progress(what: str, done: int, total: int) -> None:
    """The `Progress` of a caller who gave none."""


class ProgressCounter:
    """Adds up what several threads have done of one piece of work."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.progress = progress or no_progress
        self._guard = Lock()

    def add(self, count: int) -> None:
        with self._guard:
            self.done += count
            self.progress(self.what, min(self.done, self.total), self.total)

"""GGUF files: converted once into a folder of safetensors, which is then read like any other.

A quantized GGUF cannot be read by ranges into what the blocks compute with, and reading it through
transformers takes tens of seconds; so it is dequantized once, into the model cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from swarmcore.checkpoint.base import one_line, read_json
from swarmcore.checkpoint.fingerprint import conversion_fingerprint, file_hashes, model_fingerprint
from swarmcore.checkpoint.folder import MARKER, Marker, weight_files
from swarmcore.checkpoint.gguf_config import Metadata, check_metadata, complete_config, ends
from swarmcore.checkpoint.gguf_header import read_header
from swarmcore.checkpoint.gguf_model import LAYOUT
from swarmcore.checkpoint.gguf_tokenizer import check_tokenizer, complete_tokenizer
from swarmcore.checkpoint.location import split_name
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.checkpoint.storage import (
    check_room,
    disk_full,
    locked,
    new_folder,
    no_progress,
    storage_errors,
)
from swarmcore.checkpoint.weight_file import LocalFile
from swarmcore.distribution import install_command
from swarmcore.errors import (
    CheckpointError,
    MissingExtraError,
    StorageError,
    SwarmError,
    UnsupportedModelError,
)
from swarmcore.imports import import_large
from swarmcore.types import Progress

_SHARD = "256MB"


def converted(source: Path, cache: Path, progress: Progress | None = None) -> Path:
    """The cached conversion of a GGUF file; made now if need be.

    When another process is converting the same file, waits for it. Raises what `convert` raises.
    """
    check_gguf(source)
    target = conversion_folder(source, cache, progress)
    if not target.is_dir():
        convert(source, target, progress, cache=cache, keep=True)
    return target


def conversion_folder(source: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Where the cached conversion of a GGUF file is, once it has been made."""
    (sha256,) = file_hashes([source], source.name, cache, progress or no_progress)
    return cache / "converted" / f"{source.stem}-{sha256[:16]}-{LAYOUT}"


def convert(
    source: Path, target: Path, progress: Progress | None = None, *, cache: Path, keep: bool = False
) -> None:
    """Write the GGUF file ``source`` as a folder ``target``: bfloat16 safetensors, config, tokenizer.

    The folder appears whole or not at all. It takes memory for the whole model in bfloat16. ``keep`` takes a
    target that is there already as the result.

    Raise `CheckpointError` when the file is damaged, `UnsupportedModelError` when its architecture is not
    known or what it says of its model would be lost, `StorageError` when the disk is full or ``target``
    exists.
    """
    progress = progress or no_progress
    check_gguf(source)
    (sha256,) = file_hashes([source], source.name, cache, progress)
    with locked(target, cache, f"waiting for another process that converts {source.name}", progress):
        if target.exists():
            if keep:
                return
            raise StorageError(f"{target} exists already; remove it, or name another folder")
        doing = f"converting {source.name}"
        check_room(doing, target, source.stat().st_size)
        with new_folder(target) as part:
            with translated(source, part):
                _convert(source, part, progress)
            hashes = file_hashes(list(weight_files(part)), target.name, cache, progress)
            marker = Marker(
                name=source.stem,
                fingerprint=conversion_fingerprint(sha256, LAYOUT),
                made=model_fingerprint(read_json(part / "config.json"), hashes),
            )
            with storage_errors(doing, part):
                (part / MARKER).write_bytes(msgspec.json.format(msgspec.json.encode(marker)))


def check_gguf(source: Path) -> None:
    """Raise `CheckpointError` unless the file is a whole one in GGUF: its readers believe what it says."""
    file = LocalFile(source)
    read_header(file.read, file.size, file.label)
    if split_name(source.name):
        raise CheckpointError(
            f"{source} is one part of a split GGUF, which is served as it is, but not converted; join the "
            f"parts with llama-gguf-split --merge"
        )


@contextmanager
def translated(source: Path, target: Path) -> Iterator[None]:
    """Translate what transformers, gguf and safetensors raise, which is anything at all."""
    try:
        yield
    except SwarmError:
        raise
    except ImportError as exc:
        raise MissingExtraError(
            f"a package for reading GGUF is missing; {install_command('torch')} ({one_line(exc)})"
        ) from exc
    except Exception as exc:
        if "not supported" in str(exc):
            raise UnsupportedModelError(f"{source}: {one_line(exc)}") from exc
        if "No space left" in str(exc):
            raise disk_full(f"converting {source.name}", target) from exc
        raise CheckpointError(
            f"{source} ({source.stat().st_size} bytes) cannot be read as GGUF; if it is truncated "
            f"or damaged, download or copy it again ({type(exc).__name__}: {one_line(exc)})"
        ) from exc


def _convert(source: Path, part: Path, progress: Progress) -> None:
    import_large("transformers.modeling_utils")
    doing, size = f"converting {source.name}", source.stat().st_size
    converting = _MonotonicProgress(doing, size, progress)
    with quiet_transformers(converting.report), parsed_once():  # the first lets in one thread at a time
        tokenizer, config, metadata = _read_settings(source, progress)
        model, report = load_gguf(source, config)
        _check_loaded(source.name, report)
        if len(tokens := ends(metadata)) > 1:
            model.generation_config.eos_token_id = tokens
        needed = sum(tensor.nbytes for tensor in model.parameters())
        check_room(doing, part, needed)
        with storage_errors(doing, part, needed):
            model.save_pretrained(part, max_shard_size=_SHARD)
            tokenizer.save_pretrained(part)
    converting.report(1.0)
    with storage_errors(doing, part):
        mode = (part / "config.json").stat().st_mode
        for path in part.glob("*.safetensors"):  # always written for the owner alone
            path.chmod(mode)


def write_settings(source: Path, folder: Path, progress: Progress, config: Any = None) -> None:
    """Write config, tokenizer and settings of generation of the GGUF ``source`` into ``folder``.

    The config is that of the file, or the one given. Raise as `convert`. The values of its weights do not
    matter.
    """
    with translated(source, folder), quiet_transformers(lambda share: None), parsed_once():
        import_large("transformers.modeling_utils")
        from transformers import GenerationConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        tokenizer, config, metadata = _read_settings(source, progress, config)
        config.dtype = torch.bfloat16
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        generation = GenerationConfig.from_model_config(config)
        if len(tokens := ends(metadata)) > 1:
            generation.eos_token_id = tokens
        with storage_errors(f"converting {source.name}", folder):
            for each in (tokenizer, config, generation):
                each.save_pretrained(folder)


def load_gguf(source: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """The model of ``config`` with the tensors of the GGUF ``source`` in bfloat16, and what was not found.

    To be called within `quiet_transformers`. Raises what transformers does, which is anything at all.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        str(source.parent.resolve()),
        gguf_file=source.name,
        config=config,
        dtype=torch.bfloat16,
        output_loading_info=True,
        **_dequantize(),
    )
    return model, report


def _read_settings(source: Path, progress: Progress, config: Any = None) -> tuple[Any, Any, Metadata]:
    """Tokenizer, config (or the one given) and metadata. To be called within `quiet_transformers`."""
    from transformers import AutoConfig, AutoTokenizer

    folder = str(source.parent.resolve())
    # Of these Transformers says nothing, and they take most of the time where the layers are small.
    progress(f"reading the metadata of {source.name}", 0, 0)
    metadata = Metadata.read(source)
    if config is None:
        check_metadata(metadata)
    check_tokenizer(metadata)
    progress(f"reading the tokenizer of {source.name}", 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
    complete_tokenizer(tokenizer, metadata)
    if config is not None:
        return tokenizer, config, metadata
    progress(f"reading the config of {source.name}", 0, 0)
    config = AutoConfig.from_pretrained(folder, gguf_file=source.name)
    if config.model_type == "mistral":  # the file's name, not its architecture, had transformers say so
        config = AutoConfig.for_model("llama", **_shape(config))
    complete_config(config, metadata)
    return tokenizer, config, metadata


def _shape(config: Any) -> dict[str, Any]:
    own = ("model_type", "architectures", "sliding_window")
    return {key: value for key, value in config.to_dict().items() if key not in own}


def _check_loaded(name: str, report: dict[str, Any]) -> None:
    """Transformers makes up what it does not find."""
    if wrong := sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"]):
        raise CheckpointError(
            f"{name} lacks {len(wrong)} tensors of its model or has them in another shape, such as {wrong[0]}"
        )


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within it a GGUF file is parsed once, not for tokenizer, config and tensors each, and the table of
    tensor names made once, not for every layer: that is most of the time of a small model."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in kept.items():
        setattr(gguf, name, cache(made))
    try:
        yield
    finally:
        for name, made in kept.items():
            setattr(gguf, name, made)


class _MonotonicProgress:
    """Progress through stages that each begin at 0: what is reported never falls."""

    def __init__(self, what: str, size: int, progress: Progress) -> None:
        self._what, self._size, self._progress = what, size, progress
        self._most = 0.0

    def report(self, share: float) -> None:
        self._most = max(self._most, share)
        self._progress(self._what, int(self._most * self._size), self._size)


def _dequantize() -> dict[str, object]:
    try:
        from transformers import GgufConfig
    except ImportError:  # earlier 5.x always dequantizes
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}

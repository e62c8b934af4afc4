"""A GGUF whose tensors are dequantised as they are read: only those of the blocks that are asked for.

For models on a hub, of which only these are downloaded, and for split ones. The blocks that are wanted are
put into a small GGUF of their own, which transformers then reads like any other.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swarmcore.checkpoint.base import Checkpoint, load_config, missing_tensors, one_line
from swarmcore.checkpoint.gguf import load_gguf, parsed_once, translated, write_settings
from swarmcore.checkpoint.gguf_client import FAMILIES, client_config, end_sources
from swarmcore.checkpoint.gguf_header import STRING, UINT32, Value
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.gguf_writer import GgufContent, Part
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.checkpoint.storage import (
    ProgressCounter,
    check_room,
    locked,
    new_folder,
    no_progress,
    storage_errors,
)
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.types import Progress

_GROUP = 256 * 1024 * 1024
"""Bytes in bfloat16 that are dequantised at a time, unless one block has more."""
_ROPE = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Tensors that are part of the config, as transformers has it."""
_BLOCK = re.compile(r"(.*?\.)(\d+)(\..+)")
_SMALL_VOCABULARY = 8
_ROWS = 16 * 1024 * 1024
"""Bytes of a large tensor that are dequantised at a time."""
_READ_AS = {"gpt2": "gpt-oss", "llama": "llama"}
"""By the kind of a tokenizer, an architecture for which transformers reads those as the file has them."""
_ABANDONED = 24 * 3600.0


class GgufCheckpoint(Checkpoint):
    """Opens ``model``: config and tokenizer are written into the cache folder once."""

    def __init__(self, model: GgufModel, cache: Path, *, progress: Progress | None = None) -> None:
        """Raise `CheckpointError`, `UnsupportedModelError` for what would be lost, and `StorageError`."""
        progress = progress or no_progress
        self.name, self._model, self._cache = model.name, model, cache
        self.gguf = model
        self.info = model.info(cache, progress)
        stem = re.sub(r"[^\w.-]", "_", model.name)[:100]
        self.folder = cache / "converted" / f"{stem}-{self.info.fingerprint[:16]}-settings"
        what = f"waiting for another process that opens {model.name}"
        with locked(self.folder, cache, what, progress):
            if not self.folder.is_dir():
                with new_folder(self.folder) as part:
                    self._write_settings(stem, part, progress)
        self.config, self.raw_config = load_config(self.folder, model.name)
        self._ends: dict[str, str] | None = None
        """For an architecture whose blocks are not converted, the tensor that each of the others is."""
        self._shapes = self._list()

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def nbytes(self, names: Collection[str]) -> int:
        return sum(2 * self._shapes[name].numel() for name in self._known(names))

    def stored_dtype(self) -> torch.dtype | None:
        return torch.bfloat16

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        wanted: dict[int | None, list[str]] = {}
        for name in self._known(names):
            if self._ends is not None and name not in self._ends:
                raise UnsupportedModelError(
                    f"{name} of {self.name} is left to llama.cpp: blocks of a GGUF of the architecture "
                    f"{self._model.architecture!r} are not converted; serve them with --executor ggml"
                )
            wanted.setdefault(_block_of(name), []).append(name)
        progress = progress or no_progress
        sources = [source for block in wanted for source in self._sources(block)]
        if absent := self._model.missing(sources):
            what = f"downloading {self.name}"
            check_room(what, self._cache, absent)
            self._model.fetch(sources, ProgressCounter(what, absent, progress))
        report = ProgressCounter(f"dequantizing {self.name}", self.nbytes(names), progress)
        tensors: dict[str, torch.Tensor] = {}
        for group in self._groups(wanted):
            found = self._dequantized(group)
            for block in group:
                for name in wanted[block]:
                    tensors[name] = found.pop(name)
                    report.add(tensors[name].nbytes)
        return tensors

    def _known(self, names: Collection[str]) -> list[str]:
        if missing := set(names) - self._shapes.keys():
            raise missing_tensors(self.name, missing)
        return list(dict.fromkeys(names))

    def _write_settings(self, stem: str, folder: Path, progress: Progress) -> None:
        """Have config and tokenizer read from a GGUF with all of the metadata, and hardly any values."""
        metadata = {key: value for key, value in self._model.metadata.items() if not key.startswith("split.")}
        metadata.pop("general.alignment", None)
        config = None
        if self._model.architecture in FAMILIES:
            config = client_config(self._model)
            kind = self._model.value("tokenizer.ggml.model")
            metadata["general.architecture"] = Value.of(STRING, _READ_AS.get(kind, self._model.architecture))
        rope = [name for name in self._model.around if _ROPE.fullmatch(name)]
        parts = [
            Part.copied(place.tensor) if name in rope else Part.filled(name, (1,))
            for name, place in self._model.places.items()
        ]
        self._model.fetch(rope, ProgressCounter(f"downloading {self.name}", 0, progress))
        with self._written(stem, GgufContent(metadata, tuple(parts))) as source:
            write_settings(source, folder, progress, config)

    def _list(self) -> dict[str, torch.Size]:
        """The names and shapes of all tensors, by those of a model with one block."""
        from transformers import AutoModelForCausalLM

        config = self._config(1)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as exc:  # each family checks its config in its own way
            raise UnsupportedModelError(
                f"{self.name} ({config.model_type}) is no model that transformers can build: {one_line(exc)}"
            ) from exc
        if self._model.architecture in FAMILIES:
            self._ends = end_sources(self._model, model)
        tied = getattr(model, "_tied_weights_keys", None) or () if self.config.tie_word_embeddings else ()
        shapes: dict[str, torch.Size] = {}
        for name, data in model.state_dict().items():
            if name in tied:
                continue
            for block in [0] if _block_of(name) is None else range(self._model.blocks):
                shapes[_renumbered(name, block)] = data.shape
        return shapes

    def _config(self, blocks: int, *, whole_vocabulary: bool = True) -> Any:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
        if not whole_vocabulary:
            config.vocab_size, config.pad_token_id = _SMALL_VOCABULARY, None
        return config

    def _groups(self, wanted: Mapping[int | None, list[str]]) -> Iterator[list[int | None]]:
        """What is dequantised together: what is around the blocks on its own, and runs of blocks."""
        if None in wanted:
            yield [None]
        group: list[int | None] = []
        held = 0
        for block in sorted(block for block in wanted if block is not None):
            size = self.nbytes(wanted[block])
            if group and held + size > _GROUP:
                yield group
                group, held = [], 0
            group.append(block)
            held += size
        if group:
            yield group

    def _sources(self, block: int | None) -> list[str]:
        if block is None:
            return [name for name in self._model.around if not _ROPE.fullmatch(name)]
        return self._model.of_block(block)

    def _dequantized(self, group: list[int | None]) -> dict[str, torch.Tensor]:
        """All tensors of these blocks, or of what is around them all."""
        if self._ends is not None:
            return {name: self._plain(source, self._shapes[name]) for name, source in self._ends.items()}
        blocks = [block for block in group if block is not None]
        parts = [
            Part.copied(self._model.places[name].tensor, _in_small(name, number))
            for number, block in enumerate(group)
            for name in self._sources(block)
        ]
        prefix = f"{self._model.architecture}."
        metadata = {
            key: value
            for key, value in self._model.metadata.items()
            if key.startswith((prefix, "general.")) and key != "general.alignment"
        }
        metadata[f"{prefix}block_count"] = Value.of(UINT32, len(blocks))
        config = self._config(len(blocks), whole_vocabulary=not blocks)
        with (
            self._written("part", GgufContent(metadata, tuple(parts))) as source,
            translated(source, source),
            quiet_transformers(lambda share: None),
            parsed_once(),
        ):
            model, report = load_gguf(source, config)
        found = {
            name if _block_of(name) is None else _renumbered(name, blocks[_block_of(name) or 0]): data
            for name, data in model.state_dict().items()
            if (_block_of(name) is None) != bool(blocks)
        }
        wrong = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
        if wrong := sorted(name for name in wrong if (_block_of(name) is None) != bool(blocks)):
            raise CheckpointError(
                f"{self.name} lacks {len(wrong)} tensors of its model or has them in another shape, such as "
                f"{wrong[0]} of blocks {group}"
            )
        return found

    def _plain(self, source: str, shape: torch.Size) -> torch.Tensor:
        """A tensor of the file in bfloat16."""
        from gguf import GGMLQuantizationType, dequantize

        with self._model.opened(source) as (descriptor, tensor):
            if tuple(reversed(tensor.shape)) != tuple(shape):
                raise CheckpointError(
                    f"{self.name} has {source} of the shape {list(tensor.shape)}, not {list(reversed(shape))}"
                )
            found = torch.empty(shape, dtype=torch.bfloat16).view(-1, tensor.shape[0])
            width = tensor.nbytes // len(found)
            some = max(1, _ROWS // width)
            for row in range(0, len(found), some):
                count = min(some, len(found) - row)
                raw = os.pread(descriptor, count * width, tensor.start + row * width)
                data = np.frombuffer(raw, np.uint8).reshape(count, width)
                rows = dequantize(data, GGMLQuantizationType(tensor.type))
                found[row : row + count] = torch.from_numpy(np.array(rows, np.float32))
        return found.view(shape)

    @contextmanager
    def _written(self, stem: str, content: GgufContent) -> Iterator[Path]:
        """A file with ``content``, for as long as it is needed."""
        doing = f"reading {self.name}"
        parent = self._cache / "reading"
        with storage_errors(doing, parent, content.nbytes):
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.iterdir():  # by a process that was killed
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
            check_room(doing, parent, content.nbytes)
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                source = Path(folder) / f"{stem}.gguf"
                with source.open("wb", buffering=0) as file:
                    content.write(self._model, file, ProgressCounter(doing, content.nbytes, None))
                yield source


def _block_of(name: str) -> int | None:
    match = _BLOCK.fullmatch(name)
    return int(match[2]) if match else None


def _renumbered(name: str, block: int) -> str:
    return _BLOCK.sub(lambda match: f"{match[1]}{block}{match[3]}", name, count=1)


def _in_small(name: str, number: int) -> str:
    """What a tensor is called in a GGUF in which its block is that number."""
    return re.sub(r"^blk\.\d+\.", f"blk.{number}.", name)

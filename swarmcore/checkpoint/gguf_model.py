"""A model in GGUF as it is, in one file or in the parts of a split one: its metadata, and bytes of tensors.

Nothing here needs torch. `swarmcore.checkpoint.gguf` turns such a model into what torch computes with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from swarmcore.checkpoint.fingerprint import conversion_fingerprint
from swarmcore.checkpoint.gguf_header import Header, Tensor, Value, read_header
from swarmcore.checkpoint.location import all_parts, model_name
from swarmcore.checkpoint.storage import ProgressCounter, no_progress, storage_errors
from swarmcore.checkpoint.weight_file import LocalFile, WeightFile
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.printable import printable_line
from swarmcore.types import ModelInfo, Progress

LAYOUT = "gguf-bfloat16-3"
"""What torch is given of a GGUF. Part of the fingerprint: count it up when a file would give other tensors
or tokens."""
MAX_BLOCKS = 512
"""The most that llama.cpp takes."""

_MAX_WIDTH = 1 << 20


@attrs.frozen
class Place:
    """Where a tensor is."""

    file: WeightFile
    tensor: Tensor


class GgufModel:
    """A model in GGUF whose headers have been read and checked. Made by `read_model`."""

    def __init__(
        self,
        name: str,
        files: Sequence[WeightFile],
        metadata: Mapping[str, Value],
        places: Mapping[str, Place],
    ) -> None:
        self.name, self.files = name, files
        self.metadata = metadata
        self.places = places
        """By the names of the tensors."""
        self.architecture = str(self.value("general.architecture", ""))
        if not self.architecture:
            raise CheckpointError(f"{name} is incomplete: its metadata has no general.architecture")
        if (kind := self.value("general.type", "model")) != "model" or "adapter.type" in metadata:
            raise UnsupportedModelError(f"{name} holds no model, but what its metadata calls {kind!r}")
        self.all_blocks = self._number("block_count", MAX_BLOCKS)
        """The blocks in it, and behind them those that only predict further tokens."""
        self.blocks = self.all_blocks - self._number("nextn_predict_layers", self.all_blocks - 1, 0)
        self.width = self._number("embedding_length", _MAX_WIDTH)
        self.around: list[str] = []
        """The names of the tensors that are of no block."""
        self._by_block: dict[int, list[str]] = {}
        for tensor in places:
            match = re.fullmatch(r"blk\.(\d{1,6})\..+", tensor)
            (self._by_block.setdefault(int(match[1]), []) if match else self.around).append(tensor)
        if absent := sorted(set(range(self.blocks)) - self._by_block.keys()):
            raise CheckpointError(
                f"{name} is incomplete: it has {self.blocks} blocks, and no tensors of block {absent[0]}"
            )
        if (most := max(self._by_block)) >= self.all_blocks:
            raise CheckpointError(f"{name} has {self.all_blocks} blocks, and tensors of a block {most}")

    def of_block(self, block: int) -> list[str]:
        """The names of the block's tensors."""
        return self._by_block[block]

    def value(self, key: str, default: Any = None) -> Any:
        """What the metadata says under ``key``, decoded."""
        found = self.metadata.get(key)
        try:
            return default if found is None else found.decode()
        except ValueError as exc:
            raise CheckpointError(f"{self.name} is damaged: {printable_line(key)} is not text") from exc

    def own(self, key: str, default: Any = None) -> Any:
        """`value` of a key that begins with the architecture."""
        return self.value(f"{self.architecture}.{key}", default)

    def nbytes(self, names: Collection[str]) -> int:
        return sum(self.places[name].tensor.nbytes for name in names)

    def fetch(self, names: Collection[str], report: ProgressCounter) -> None:
        """Make sure that the bytes of these tensors are here. Raises as `WeightFile.fetch`."""
        for file, ranges in self._ranges(names):
            file.fetch(ranges, report)

    def missing(self, names: Collection[str]) -> int:
        """How many bytes `fetch` would have to download."""
        return sum(file.missing(ranges) for file, ranges in self._ranges(names))

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A descriptor of the file that a fetched tensor is in, and where it is in there."""
        place = self.places[name]
        with (
            storage_errors("reading the weights", place.file.path),
            place.file.path.open("rb", buffering=0) as file,
        ):
            yield file.fileno(), place.tensor

    def info(self, cache: Path, progress: Progress | None = None) -> ModelInfo:
        """Which model it is: that of `swarmcore.checkpoint.open_checkpoint`, whichever executor reads it."""
        hashes = (file.sha256(cache, progress or no_progress) for file in self.files)
        fingerprint = conversion_fingerprint("+".join(sorted(hashes)), LAYOUT)
        return ModelInfo(self.name, fingerprint, self.blocks, self.width)

    def _ranges(self, names: Collection[str]) -> list[tuple[WeightFile, list[tuple[int, int]]]]:
        found: dict[str, tuple[WeightFile, list[tuple[int, int]]]] = {}
        for place in (self.places[name] for name in names):
            ranges = found.setdefault(place.file.label, (place.file, []))[1]
            ranges.append((place.tensor.start, place.tensor.end))
        return list(found.values())

    def _number(self, key: str, most: int, default: int | None = None) -> int:
        found = self.own(key, default)
        if found is None:
            raise CheckpointError(f"{self.name} is incomplete: its metadata has no {self.architecture}.{key}")
        if not isinstance(found, int) or not (1 if default is None else 0) <= found <= most:
            raise CheckpointError(f"{self.name} is damaged: its {self.architecture}.{key} is {found!r}")
        return found


def read_model(name: str, files: Sequence[WeightFile]) -> GgufModel:
    """Read the headers of a model's files, the first of which has the metadata.

    Raise as `read_header` does, and `CheckpointError` for parts that do not belong together.
    """
    headers = [(file, read_header(file.read, file.size, file.label)) for file in files]
    places: dict[str, Place] = {}
    for number, (file, header) in enumerate(headers):
        _check_part(file.label, header, number, len(files))
        for tensor in header.tensors.values():
            if tensor.name in places:
                there = places[tensor.name].file.label
                raise CheckpointError(
                    f"{there} and {file.label} both have a tensor {printable_line(tensor.name)}: parts of "
                    f"several models are mixed up"
                )
            places[tensor.name] = Place(file, tensor)
    model = GgufModel(name, files, headers[0][1].metadata, places)
    if (stated := model.value("split.tensors.count")) not in (None, len(places)):
        raise CheckpointError(
            f"{name} is incomplete: its parts have {len(places)} tensors of the {stated} that belong to it"
        )
    return model


def _check_part(label: str, header: Header, number: int, count: int) -> None:
    said = {key: header.metadata.get(f"split.{key}") for key in ("no", "count")}
    no, total = (value.decode() if value is not None else None for value in said.values())
    if (no or 0, total or 1) == (number, count) or (count == 1 and total == 0):
        return
    if count == 1 or (total or 1) != count:
        raise CheckpointError(f"{label} says that it is one of {total or 1} parts, and {count} are called so")
    raise CheckpointError(f"{label} says that it is part {no} (of 0 to {count - 1}), not {number}")


def open_local(path: Path) -> GgufModel:
    """The model of which ``path`` is the file, or any part. Raises as `read_model`."""
    parts = [path.with_name(part) for part in all_parts(path.name)]
    if absent := [part for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{absent[0]} is missing: the model is split into {len(parts)} parts, which all have to be in "
            f"one folder"
        )
    return read_model(model_name(path.name), [LocalFile(part.absolute()) for part in parts])

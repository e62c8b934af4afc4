"""A checkpoint in a local folder: safetensors files, one or several with an index."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
import msgspec
import torch

from swarmcore.checkpoint.base import (
    Checkpoint,
    describe,
    load_config,
    missing_tensors,
    read_json,
)
from swarmcore.checkpoint.fingerprint import file_hashes, model_fingerprint
from swarmcore.checkpoint.location import INDEX, LFS_POINTER, WEIGHTS, lfs_pointer
from swarmcore.checkpoint.storage import ProgressCounter, no_progress, storage_errors
from swarmcore.errors import CheckpointError
from swarmcore.types import Progress

MAX_HEADER = 100 * 1024 * 1024
"""The format's own limit on a header's length, in bytes."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@attrs.frozen
class Entry:
    """One tensor of a safetensors file: bytes ``start`` to ``end`` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def header_length(prefix: bytes, file: str, size: int) -> int:
    """The length of the JSON header from a file's first 8 bytes, checked against the file's ``size``.

    Raise `CheckpointError` when this cannot be a safetensors file, or is cut off within its header.
    """
    if len(prefix) < 8:
        raise CheckpointError(f"{file} is truncated: {size} bytes, too few for a safetensors file")
    if prefix[:8] == LFS_POINTER[:8]:
        raise lfs_pointer(file)
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER or length < 2:
        raise CheckpointError(
            f"{file} is not a safetensors file, or is damaged: its header length is {length}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file} is truncated: its header alone takes {8 + length} bytes, it has {size}"
        )
    return length


def parse_header(text: bytes, file: str, size: int) -> dict[str, Entry]:
    """The tensors of a file of ``size`` bytes with the JSON header ``text``, by name.

    Raise `CheckpointError` when the header is garbage, or tells of more or fewer bytes than the file has.
    """
    try:
        raw = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
        base = 8 + len(text)
        entries = {name: _entry(name, raw[name], base) for name in raw if name != "__metadata__"}
    except CheckpointError as exc:
        raise CheckpointError(f"{file}: {exc.message}") from exc
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{file} has a damaged safetensors header: {exc}") from exc
    expected = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != expected:
            raise CheckpointError(
                f"{file} has a damaged safetensors header: {entry.name} overlaps or leaves a gap"
            )
        expected = entry.end
    if expected != size:
        kind = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"{file} is {kind}: {size} bytes, expected {expected}; download or copy it again",
            actual=size,
            expected=expected,
        )
    return entries


def _entry(name: str, raw: dict[str, Any], base: int) -> Entry:
    start, end = raw["data_offsets"]
    shape = tuple(raw["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(f"{name} has a shape or an offset that is not a whole number")
    dtype = _DTYPES.get(raw["dtype"])
    if dtype is None:
        raise CheckpointError(f"tensor {name} has the dtype {raw['dtype']!r}, which cannot be read")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{name} has {end - start} bytes, its shape {list(shape)} and dtype say otherwise")
    return Entry(name, dtype, shape, base + start, base + end)


def find_lfs_pointer(folder: Path) -> Path | None:
    """A file in ``folder`` that is only a git-lfs pointer; None when there is none."""
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                return file
    return None


def view_as(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The bytes ``data`` (uint8, 1-d) as the tensor of ``entry``, without a copy."""
    return data.view(entry.dtype).reshape(entry.shape)


MARKER = "swarmcore.json"
"""Written into a folder that was converted: what it was made from."""

_CHUNK = 32 * 1024 * 1024
_THREADS = 4


class Marker(msgspec.Struct):
    """Keeps a converted folder's identity that of its source, for as long as nobody changes the folder."""

    name: str
    fingerprint: str
    made: str
    """The folder's own `model_fingerprint` when it was made."""


class FolderCheckpoint(Checkpoint):
    """Opens ``folder``: reads and checks all headers, and makes sure that no file is missing or cut off."""

    def __init__(self, folder: Path, cache: Path, *, progress: Progress | None = None) -> None:
        """Raise `ModelNotFoundError` when this is no model, `CheckpointError` when it is damaged."""
        progress = progress or no_progress
        self.name = folder.resolve().name
        self.folder = folder = folder.absolute()
        self.config, self.raw_config = load_config(folder, str(folder))
        shards = weight_files(folder)
        self._files: dict[str, Path] = {}
        self._entries: dict[str, Entry] = {}
        for file, entries in shards.items():
            for name in entries.keys() & self._entries.keys():
                self._check_copy(file, entries[name])
            self._files |= dict.fromkeys(entries, file)
            self._entries |= entries
        fingerprint = model_fingerprint(
            self.raw_config, file_hashes(list(shards), self.name, cache, progress)
        )
        if marker := _read_marker(folder, fingerprint):
            self.name, fingerprint = marker.name, marker.fingerprint
        self.info = describe(self.name, self.config, fingerprint)

    def stored_dtype(self) -> torch.dtype | None:
        return next((e.dtype for e in self._entries.values() if e.dtype.is_floating_point), None)

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def nbytes(self, names: Collection[str]) -> int:
        return sum(entry.nbytes for entry in self._select(names))

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        files: dict[Path, list[Entry]] = {}
        for entry in self._select(names):
            files.setdefault(self._files[entry.name], []).append(entry)
        report = ProgressCounter(f"reading {self.name}", self.nbytes(names), progress)
        tensors: dict[str, torch.Tensor] = {}
        for file, entries in files.items():
            tensors |= read_tensors(file, entries, report)
        return tensors

    def _check_copy(self, file: Path, entry: Entry) -> None:
        """Raise `CheckpointError` when a tensor that is in another file, too, is another one there."""
        name = entry.name
        report = ProgressCounter(f"comparing {name}", 2 * entry.nbytes, None)
        copies = ((self._files[name], self._entries[name]), (file, entry))
        one, other = (read_tensors(path, [there], report)[name] for path, there in copies)
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
            raise CheckpointError(
                f"{self.folder} has two tensors called {name}, in {self._files[name].name} and {file.name}, "
                f"and they differ: shards of several models are mixed up"
            )

    def _select(self, names: Collection[str]) -> list[Entry]:
        if missing := set(names) - self._entries.keys():
            raise missing_tensors(self.name, missing)
        return [self._entries[name] for name in dict.fromkeys(names)]


def weight_files(folder: Path) -> dict[Path, dict[str, Entry]]:
    """The safetensors files of a model folder and the tensors in each, all checked.

    Raise `CheckpointError` for a missing, truncated or damaged file, and for weights kept in pickles.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():  # as transformers has it: the single file goes before an index
        return {folder / WEIGHTS: read_header(folder / WEIGHTS)}
    if index.is_file():
        weight_map = parse_index(read_json(index), str(index))
        # What an index promises and a shard lacks is missed by who needs it: some name unused tensors.
        return {folder / file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    raise no_weights(str(folder), [path.name for path in folder.iterdir()])


def parse_index(raw: dict[str, Any], file: str) -> dict[str, str]:
    """Tensor name to file name, from the content of an index. Raise `CheckpointError` when it is damaged."""
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} is damaged: it has no weight_map")
    for shard in set(map(str, weight_map.values())):
        path = PurePosixPath(shard)
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in shard
        if not inside or path.suffix != ".safetensors":
            raise CheckpointError(f"{file} is damaged: {shard!r} is not the name of a safetensors file")
    return {name: str(shard) for name, shard in weight_map.items()}


def no_weights(where: str, files: Iterable[str]) -> CheckpointError:
    if pickles := sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        return CheckpointError(
            f"{where} has its weights in pickles only ({pickles[0]}), which can run code when loaded and are "
            f"never read; convert it to safetensors on a machine where you trust it: "
            f"AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    return CheckpointError(f"{where} has no weights: neither {WEIGHTS} nor {INDEX}")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; raise `CheckpointError` when it is missing, cut off or garbage."""
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; the model's folder is incomplete: download or copy it again"
        )
    with storage_errors("reading the weights", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(file.read(8), str(path), size)
        return parse_header(file.read(length), str(path), size)


def read_tensors(path: Path, entries: Collection[Entry], report: ProgressCounter) -> dict[str, torch.Tensor]:
    """Read these tensors from one file, into memory of their own.

    Not mapped: a mapped file that is cut off later kills the process.
    """

    def read(entry: Entry) -> torch.Tensor:
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        target, done = data.numpy().data, 0
        while done < entry.nbytes:
            count = os.preadv(file.fileno(), [target[done : done + _CHUNK]], entry.start + done)
            if not count:
                raise CheckpointError(f"{path} was cut off while it was read: no byte {entry.start + done}")
            done += count
            report.add(count)
        return view_as(data, entry)

    with (
        storage_errors("reading the weights", path),
        path.open("rb", buffering=0) as file,
        ThreadPoolExecutor(_THREADS, "read-tensors") as pool,
    ):
        return {entry.name: data for entry, data in zip(entries, pool.map(read, entries), strict=True)}


def _read_marker(folder: Path, made: str) -> Marker | None:
    try:
        marker = msgspec.json.decode((folder / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.DecodeError):
        return None
    return marker if marker.made == made else None

"""The header of a safetensors file: which tensor is where. Read and checked without touching the tensors.

A file is an 8-byte little-endian header length, that much JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import msgspec
import torch

from swarmcore.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git checked out without its content, where git-lfs is not installed."""

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


def lfs_pointer(file: Path | str) -> CheckpointError:
    """The error for a file that is only a git-lfs pointer."""
    return CheckpointError(
        f"{file} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in its "
        f"folder, or download the model with `hf download`"
    )


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

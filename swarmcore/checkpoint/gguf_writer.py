"""A GGUF that is made of parts of another one: tensors under other names, their bytes as they are."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import attrs

from swarmcore.checkpoint.gguf_header import MAGIC, Tensor, Value, padded, tensor_bytes
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.storage import ProgressCounter
from swarmcore.errors import CheckpointError

_VERSION = 3
_CHUNK = 4 * 1024 * 1024
_F32 = 0


@attrs.frozen
class Part:
    """A tensor of the file: a copy of ``source``, or all ``fill``."""

    name: str
    type: int
    shape: tuple[int, ...]
    source: str | None = None
    fill: float = 0.0

    @classmethod
    def copied(cls, tensor: Tensor, name: str | None = None) -> Part:
        """``tensor`` as it is, under another ``name`` or its own."""
        return cls(name or tensor.name, tensor.type, tensor.shape, tensor.name)

    @classmethod
    def filled(cls, name: str, shape: tuple[int, ...], value: float = 0.0) -> Part:
        """One of 32-bit floats that are all ``value``."""
        return cls(name, _F32, shape, fill=value)

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


class GgufContent:
    """What is in a file."""

    def __init__(self, metadata: Mapping[str, Value], parts: tuple[Part, ...]) -> None:
        self.metadata, self.parts = metadata, parts
        self._head = self._make_head()
        self.nbytes = len(self._head) + sum(padded(part.nbytes) for part in parts)
        """Of the whole file."""

    @property
    def sources(self) -> list[str]:
        """The names of the tensors that are copied."""
        return [part.source for part in self.parts if part.source is not None]

    def write(self, model: GgufModel, file: BinaryIO, report: ProgressCounter) -> None:
        """Write all of it, with tensors of ``model`` that have been fetched. A few MiB of memory are used.

        Raise `OSError`, and `CheckpointError` when the model's files have become shorter.
        """
        _put(file, self._head, report)
        for part in self.parts:
            for data in _content(model, part):
                _put(file, data, report)
            _put(file, bytes(padded(part.nbytes) - part.nbytes), report)

    def _make_head(self) -> bytes:
        written = [MAGIC, struct.pack("<IQQ", _VERSION, len(self.parts), len(self.metadata))]
        for key, value in self.metadata.items():
            written += [_text(key), value.encode()]
        offset = 0
        for part in self.parts:
            count = len(part.shape)
            written.append(_text(part.name))
            written.append(struct.pack(f"<I{count}QIQ", count, *part.shape, part.type, offset))
            offset += padded(part.nbytes)
        head = b"".join(written)
        return head + bytes(padded(len(head)) - len(head))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _content(model: GgufModel, part: Part) -> Iterator[bytes]:
    if part.source is None:
        filled = struct.pack("<f", part.fill) * min(math.prod(part.shape), _CHUNK // 4)
        for at in range(0, part.nbytes, len(filled)):
            yield filled[: part.nbytes - at]
        return
    with model.opened(part.source) as (descriptor, tensor):
        at = tensor.start
        while at < tensor.end:
            data = os.pread(descriptor, min(_CHUNK, tensor.end - at), at)
            if not data:
                raise CheckpointError(f"{model.name} was cut off while it was read: it has no byte {at}")
            yield data
            at += len(data)


def _put(file: BinaryIO, data: bytes, report: ProgressCounter) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    report.add(len(data))

"""Tensors as they travel: a small description in the header, the bytes beside it.

No array library is imported here: a tensor is a dtype name, a shape, and a buffer of little-endian values in
C order. Codecs turn that buffer into a smaller one and back; codecs that need arithmetic register themselves
from the executor that has it (see `register_codec`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Protocol

import attrs
import msgspec
import zstandard

from swarmcore.errors import InputError, InternalError, ProtocolError, UnknownCodecError
from swarmcore.wire.limits import Limits

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Size of one value of each dtype that may travel."""

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes of hidden states."""

ZSTD_LEVEL = 1

SLACK = 1024
"""Bytes that a codec may add to small tensors; whoever keeps encoded ones relies on them being no larger."""


Name = Annotated[str, msgspec.Meta(max_length=128)]
Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorHeader(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor's entry in a message header."""

    name: Name
    dtype: Name
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=64)]
    codec: Name
    """``"raw"`` or the name of a registered codec, with ``"+zstd"`` when compressed on top."""
    nbytes: Size
    """Encoded size: how many of the message's bytes are this tensor's."""


@attrs.frozen
class Tensor:
    """A tensor on the wire, still encoded: ``data`` is in the form that ``codec`` gives it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview = attrs.field(repr=False, eq=False)
    codec: str = "raw"

    @property
    def decoded_nbytes(self) -> int:
        """Size in bytes of the values once decoded."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def encode(self, codec: str) -> Tensor:
        """This raw tensor in another codec. Raise `UnknownCodecError`; `InputError` unless it is raw now."""
        if self.codec != "raw":
            raise InputError(f"tensor {self.name!r} is already encoded as {self.codec!r}")
        if codec == "raw":
            return self
        base, zstd = _split(codec)
        data = self.data
        if base != "raw":
            data = _codec(base).encode(data, self.dtype, self.shape)
        if zstd:
            data = memoryview(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data))
        return attrs.evolve(self, data=data, codec=codec)

    def decode(self) -> Tensor:
        """This tensor as raw values; itself when it is raw already.

        Never allocates more than the shape and dtype announce. Raise `ProtocolError` when the bytes do not
        decode to exactly that size, `UnknownCodecError` for a codec this peer does not have.
        """
        if self.codec == "raw":
            return self
        base, zstd = _split(self.codec)
        size = self.decoded_nbytes if base == "raw" else _codec(base).encoded_nbytes(self.dtype, self.shape)
        data = _unzstd(self.data, size) if zstd else self.data
        if data.nbytes != size:
            raise ProtocolError(
                f"tensor {self.name!r} holds {data.nbytes} bytes where its shape needs {size}"
            )
        if base != "raw":
            data = _codec(base).decode(data, self.dtype, self.shape)
            if data.nbytes != self.decoded_nbytes:
                raise InternalError(f"codec {base!r} made {data.nbytes} bytes of {self}")
        return attrs.evolve(self, data=data, codec="raw")

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first:last`` of this raw, two-dimensional tensor; a view."""
        width = self.shape[1] * ITEM_BYTES[self.dtype]
        data = self.data.cast("B")[first * width : last * width]
        return Tensor(self.name, self.dtype, (last - first, self.shape[1]), data)

    def widened(self) -> Tensor:
        """This raw tensor of floats as float32, exactly."""
        if self.dtype == "float32":
            return self
        given = self.data.cast("B")
        values = bytearray(2 * given.nbytes)
        if self.dtype == "bfloat16":  # the upper half of a float32
            values[2::4], values[3::4] = given[::2], given[1::2]
        elif self.dtype == "float16":
            many = given.nbytes // 2
            struct.pack_into(f"<{many}f", values, 0, *struct.unpack(f"<{many}e", given))
        else:
            raise InputError(f"tensor {self.name!r} is of dtype {self.dtype!r}; expected floats")
        return attrs.evolve(self, dtype="float32", data=memoryview(values))

    def header(self) -> TensorHeader:
        return TensorHeader(self.name, self.dtype, self.shape, self.codec, self.data.nbytes)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of raw tensors of one dtype and width, in one tensor with the name of the first."""
    if len(parts) == 1:
        return parts[0]
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    data = memoryview(bytearray().join(part.data for part in parts))
    return Tensor(first.name, first.dtype, (rows, first.shape[1]), data)


class Codec(Protocol):
    """A lossy or lossless form of a tensor's bytes."""

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Raw values to encoded bytes."""

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        """Encoded bytes, of exactly `encoded_nbytes`, to raw values of ``dtype`` and ``shape``."""

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        """How many bytes `encode` gives. Raise `ProtocolError` for a dtype that the codec does not take."""


_codecs: dict[str, Codec] = {}


def register_codec(name: str, codec: Codec) -> None:
    """Make ``codec`` known under ``name`` in this process."""
    _codecs[name] = codec


def codec_names() -> list[str]:
    """Codecs this process can decode, without the ``+zstd`` forms."""
    return ["raw", *sorted(_codecs)]


def check_headers(headers: Sequence[TensorHeader], limits: Limits) -> None:
    """Raise `ProtocolError` unless the tensors of one message are sane and within the limits together."""
    if len(headers) > limits.max_tensors:
        raise ProtocolError(f"{len(headers)} tensors in one message, above the limit of {limits.max_tensors}")
    total = 0
    for header in headers:
        item = ITEM_BYTES.get(header.dtype)
        if item is None:
            raise ProtocolError(f"tensor {header.name!r} has unknown dtype {header.dtype!r}")
        if len(header.shape) > limits.max_dimensions:
            raise ProtocolError(f"tensor {header.name!r} has {len(header.shape)} dimensions")
        size = math.prod(header.shape) * item
        if header.codec == "raw" and header.nbytes != size:
            raise ProtocolError(
                f"tensor {header.name!r} has {header.nbytes} bytes where its shape needs {size}"
            )
        if header.nbytes > 2 * size + SLACK:
            raise ProtocolError(
                f"tensor {header.name!r} has {header.nbytes} bytes where its values take {size}: no codec "
                f"makes them so much larger"
            )
        total += size
        if total > limits.max_decoded:
            raise ProtocolError(f"tensor {header.name!r} takes the message above {limits.max_decoded} bytes")


def _split(codec: str) -> tuple[str, bool]:
    base, plus, compression = codec.partition("+")
    if plus and compression != "zstd":
        raise UnknownCodecError(f"codec {codec!r} is not known: only zstd can be put on top of a codec")
    return base, bool(plus)


def _codec(name: str) -> Codec:
    try:
        return _codecs[name]
    except KeyError:
        known = ", ".join(codec_names())
        raise UnknownCodecError(f"tensor codec {name!r} is not known here (known: {known})") from None


def _unzstd(data: memoryview, size: int) -> memoryview:
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size:
            raise ProtocolError(f"compressed tensor announces {frame.content_size} bytes, expected {size}")
        # A zstd block of 128 KiB takes 4 bytes at least: a frame that claims more is not worth the memory.
        if size > (data.nbytes // 4 + 1) * 2**17:
            raise ProtocolError(f"a frame of {data.nbytes} bytes cannot hold the {size} that it announces")
        # A frame may ask for a window far above its content; that memory is the attacker's to choose.
        if frame.window_size > max(size, 2**20):
            raise ProtocolError(f"compressed tensor asks for a window of {frame.window_size} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise ProtocolError(f"compressed tensor does not decompress: {exc}") from exc
    return memoryview(raw)

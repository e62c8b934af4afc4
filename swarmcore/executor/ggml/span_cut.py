"""What the GGUF of a span is made of: the model's metadata for its layers alone, and which tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import attrs

from swarmcore.checkpoint.gguf_header import (
    ARRAY,
    BOOL,
    FLOAT32,
    SCALARS,
    STRING,
    UINT32,
    Tensor,
    Value,
)
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.errors import CheckpointError, SpanError, UnsupportedModelError
from swarmcore.executor.ggml.architectures import Architecture, architecture_of, check_cut
from swarmcore.printable import printable_line
from swarmcore.types import Span

VOCABULARY = 32
"""Tokens of a span's model, whose embeddings and head are zeros: llama.cpp wants some, nobody uses them."""

_F32 = 0
_PATTERN = "attention.sliding_window_pattern"
_PER_LAYER = frozenset(
    {
        "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "expert_feed_forward_length", "expert_used_count", _PATTERN,
    }
)  # fmt: skip
"""Keys that may have a value for each layer."""
_WHOLE_ARRAYS = frozenset({"rope.dimension_sections"})
_BY_NUMBER = re.compile(r"layer(?!_?norm)|block|interval|pattern|nextn|deepstack|shared_kv|_step|indexer")
"""In a key's name: that it is about layers by their number. Those that are not handled are refused."""
_ROPE = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that all layers share."""
_FILLED = {
    "token_embd.weight": 0.0,
    "output.weight": 0.0,
    "output.bias": 0.0,
    "output_norm.weight": 1.0,
    "output_norm.bias": 0.0,
    "position_embd.weight": 0.0,
}
"""Tensors around the layers that llama.cpp wants, and a span has no use for: what they are filled with. What
learned positions add, the client has added."""


@attrs.frozen
class Part:
    """A tensor of a span's GGUF: copied from ``source``, or as large as ``tensor`` says and all ``fill``."""

    tensor: Tensor
    """Without a place."""
    source: str | None = None
    fill: float = 0.0


@attrs.frozen
class SpanCut:
    """The content of a span's GGUF."""

    metadata: Mapping[str, Value]
    parts: tuple[Part, ...]

    @property
    def sources(self) -> list[str]:
        """The names of the tensors that are copied."""
        return [part.source for part in self.parts if part.source is not None]


def cut_span(model: GgufModel, span: Span) -> SpanCut:
    """What a GGUF of the blocks ``span`` has in it.

    Raise `SpanError` for blocks that the model does not have, `UnsupportedModelError` where the blocks cannot
    be cut out or something in the file is not understood, `CheckpointError` for a file that is damaged.
    """
    if not Span(0, model.blocks).covers(span):
        raise SpanError(f"blocks {span} are not in {model.name}, which has blocks 0:{model.blocks}")
    check_cut(model, span)
    return SpanCut(dict(_metadata(model, span)), tuple(_parts(model, span)))


def _metadata(model: GgufModel, span: Span) -> Iterator[tuple[str, Value]]:
    architecture, prefix = architecture_of(model), f"{model.architecture}."
    yield "general.architecture", Value.of(STRING, model.architecture)
    for key, value in model.metadata.items():
        if key.startswith(prefix):
            if (cut := _cut_value(model, architecture, key.removeprefix(prefix), value, span)) is not None:
                yield key, cut
        elif not key.startswith(("tokenizer.", "split.", "general.architecture", "general.alignment")):
            yield key, value
    if architecture.windows:
        yield prefix + _PATTERN, Value.of(BOOL, _sliding(model, architecture.windows)[span.start : span.end])
    if architecture.scales_inputs:
        yield prefix + "embedding_scale", Value.of(FLOAT32, 1.0)
    if architecture.residual_scale and f"{prefix}residual_scale" not in model.metadata:
        scale = _single(architecture.residual_scale) / _single(math.sqrt(model.blocks))
        yield prefix + "residual_scale", Value.of(FLOAT32, scale)
    yield prefix + "vocab_size", Value.of(UINT32, VOCABULARY)
    yield "tokenizer.ggml.model", Value.of(STRING, "none")


def _cut_value(
    model: GgufModel, architecture: Architecture, key: str, value: Value, span: Span
) -> Value | None:
    """The value of a key for the span's layers; None to leave it out."""
    match key:
        case "block_count":
            return Value.of(UINT32, len(span))
        case "leading_dense_block_count":
            return Value.of(UINT32, max(0, _whole(model, key) - span.start))
        case "nextn_predict_layers" | "vocab_size":
            return None
        case "interleave_moe_layer_step" if architecture.period:
            return value
        case "embedding_scale" if architecture.scales_inputs:
            return None
        case "attention.sliding_window_pattern" if architecture.windows:
            return None
    if value.item is not None and key in _PER_LAYER:
        if value.count < model.blocks or value.item not in SCALARS:
            raise CheckpointError(
                f"{model.name} is damaged: {model.architecture}.{key} has {value.count} values for "
                f"{model.blocks} blocks"
            )
        return Value.of(value.item, value.decode()[span.start : span.end])
    known = key in _WHOLE_ARRAYS if value.kind == ARRAY else not _BY_NUMBER.search(key) or not value.decode()
    if not known:
        raise UnsupportedModelError(
            f"{model.name} has {printable_line(f'{model.architecture}.{key}')}, which depends on the number "
            f"of a layer or is not understood: its blocks are not cut apart"
        )
    return value


def _single(value: float) -> float:
    """As a float of 32 bits has it."""
    return float(Value.of(FLOAT32, value).decode())


def _whole(model: GgufModel, key: str) -> int:
    found = model.own(key)
    if not isinstance(found, int) or not 0 <= found <= model.all_blocks:
        raise CheckpointError(f"{model.name} is damaged: its {model.architecture}.{key} is {found!r}")
    return found


def _sliding(model: GgufModel, windows: tuple[int, bool]) -> list[bool]:
    """For each layer of the whole model, whether its window slides."""
    every, first = windows
    pattern = model.own(_PATTERN, every)
    if isinstance(pattern, list):
        if len(pattern) < model.blocks:
            raise CheckpointError(f"{model.name} is damaged: {_PATTERN} has {len(pattern)} values")
        return [bool(slides) for slides in pattern]
    if not isinstance(pattern, int):
        raise CheckpointError(f"{model.name} is damaged: {_PATTERN} is {pattern!r}")
    full = 0 if first else pattern - 1
    return [pattern == 0 or layer % pattern != full for layer in range(model.blocks)]


def _parts(model: GgufModel, span: Span) -> Iterator[Part]:
    for name, place in model.places.items():
        if name.startswith("blk."):
            continue
        if name in _ROPE:
            yield Part(place.tensor, name)
        elif name in _FILLED:
            shape = place.tensor.shape
            if name in ("token_embd.weight", "output.weight"):
                shape = (model.width, VOCABULARY)
            elif name == "output.bias":
                shape = (VOCABULARY,)
            yield Part(Tensor(name, _F32, shape, 0, 4 * math.prod(shape)), fill=_FILLED[name])
        else:
            raise UnsupportedModelError(
                f"{model.name} has the tensor {printable_line(name)} beside its blocks, and a part of the "
                f"model would be computed without it"
            )
    for block in span:
        for name in model.of_block(block):
            renamed = f"blk.{block - span.start}.{name.split('.', 2)[2]}"
            yield Part(attrs.evolve(model.places[name].tensor, name=renamed), name)

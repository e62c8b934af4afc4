"""What the GGUF of a span is made of: the model's metadata for its layers alone, and which tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from swarmcore.checkpoint.gguf_header import (
    ARRAY,
    BOOL,
    FLOAT32,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    UINT32,
    Tensor,
    Value,
)
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.gguf_writer import GgufContent, Part
from swarmcore.errors import CheckpointError, SpanError, UnsupportedModelError
from swarmcore.executor.ggml.architectures import (
    LONG_FREQUENCIES,
    POSITIONS,
    SHORT_FREQUENCIES,
    WINDOW_PATTERN,
    architecture_of,
    check_cut,
    sliding_layers,
)
from swarmcore.printable import printable_line
from swarmcore.types import Span

VOCABULARY = 32
"""Tokens of a span's model, whose embeddings and head are zeros: llama.cpp wants some, nobody uses them."""

_PER_LAYER = frozenset(
    {
        "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "expert_feed_forward_length", "expert_used_count", WINDOW_PATTERN,
    }
)  # fmt: skip
"""Keys that may have a value for each layer."""
_WHOLE_ARRAYS = frozenset({"rope.dimension_sections"})
_BY_NUMBER = re.compile(r"layer(?!_?norm)|block|interval|pattern|nextn|deepstack|shared_kv|_step|indexer")
"""In a key's name: that it is about layers by their number. Those that are not handled are refused."""
_NOT_COMPUTED = frozenset({"I8", "I16", "I32", "I64", "F64"})
_ROPE = {"rope_freqs.weight": "rope_freqs.weight"} | dict.fromkeys(
    (LONG_FREQUENCIES, SHORT_FREQUENCIES), SHORT_FREQUENCIES
)
"""Tensors that all layers share, and which one is taken for each (see `max_positions`)."""
_FILLED = {
    "token_embd.weight": 0.0,
    "output.weight": 0.0,
    "output.bias": 0.0,
    "output_norm.weight": 1.0,
    "output_norm.bias": 0.0,
    POSITIONS: 0.0,
    "token_embd_norm.weight": 1.0,
    "token_embd_norm.bias": 0.0,
}
"""Tensors around the layers that llama.cpp wants, and a span has no use for: what they are filled with. What
learned positions add, the client has added, as it has normalised embeddings."""


def cut_span(model: GgufModel, span: Span) -> GgufContent:
    """What a GGUF of the blocks ``span`` has in it.

    Raise `SpanError` for blocks that the model does not have, `UnsupportedModelError` where the blocks cannot
    be cut out or something in the file is not understood, `CheckpointError` for a file that is damaged.
    """
    if not Span(0, model.blocks).covers(span):
        raise SpanError(f"blocks {span} are not in {model.name}, which has blocks 0:{model.blocks}")
    check_cut(model, span)
    return GgufContent(dict(_Layers(model, span).metadata()), tuple(_parts(model, span)))


class _Layers:
    """The metadata of a model for the layers of a span."""

    def __init__(self, model: GgufModel, span: Span) -> None:
        self._model, self._span = model, span
        self._architecture = architecture_of(model)
        sliding = sliding_layers(model)
        self._sliding = None if sliding is None else sliding[span.start : span.end]
        # llama.cpp aborts on a model with windows of which none slides: then one more layer is counted, among
        # those that only predict further tokens, whose window does, and which has no tensors and no cache.
        self._counted = len(span) + (self._sliding is not None and not any(self._sliding))

    def metadata(self) -> Iterator[tuple[str, Value]]:
        model, architecture, prefix = self._model, self._architecture, f"{self._model.architecture}."
        yield "general.architecture", Value.of(STRING, model.architecture)
        for key, value in model.metadata.items():
            if key.startswith(prefix):
                if (cut := self._cut(key.removeprefix(prefix), value)) is not None:
                    yield key, cut
            elif not key.startswith(("tokenizer.", "split.", "general.architecture", "general.alignment")):
                yield key, value
        yield prefix + "block_count", Value.of(UINT32, self._counted)
        if self._sliding is not None:
            sliding = [*self._sliding, True][: self._counted]
            yield prefix + WINDOW_PATTERN, Value.of(BOOL, sliding)
        if self._counted > len(self._span):
            yield prefix + "nextn_predict_layers", Value.of(UINT32, 1)
        if architecture.scales_inputs:
            yield prefix + "embedding_scale", Value.of(FLOAT32, 1.0)
        if architecture.residual_scale and f"{prefix}residual_scale" not in model.metadata:
            scale = _single(architecture.residual_scale) / _single(math.sqrt(model.blocks))
            yield prefix + "residual_scale", Value.of(FLOAT32, scale)
        yield prefix + "vocab_size", Value.of(UINT32, VOCABULARY)
        yield "tokenizer.ggml.model", Value.of(STRING, "none")

    def _cut(self, key: str, value: Value) -> Value | None:
        """The value of a key for the span's layers; None to leave it out."""
        architecture = self._architecture
        match key:
            case "block_count" | "nextn_predict_layers" | "vocab_size":
                return None
            case "embedding_scale" if architecture.scales_inputs:
                return None
            case "attention.sliding_window_pattern" if self._sliding is not None:
                return None
            case "interleave_moe_layer_step" if architecture.period:
                return value
            case "leading_dense_block_count":
                return Value.of(UINT32, max(0, self._leading(key) - self._span.start))
        if value.item is not None and key in _PER_LAYER:
            if value.count < self._model.blocks or value.item not in SCALARS:
                raise self._damaged(key, f"an array of {value.count}")
            own = value.decode()[self._span.start : self._span.end]
            return Value.of(value.item, [*own, own[-1]][: self._counted])
        if value.kind == ARRAY:
            known = key in _WHOLE_ARRAYS
        else:
            known = not _BY_NUMBER.search(key) or not any(value.raw)  # 0: there are none
        if not known:
            shown = printable_line(f"{self._model.architecture}.{key}")
            raise UnsupportedModelError(
                f"{self._model.name} has {shown}, which depends on the number of a layer or is not "
                f"understood: its blocks are not cut apart"
            )
        return value

    def _leading(self, key: str) -> int:
        found = self._model.own(key)
        if not isinstance(found, int) or not 0 <= found <= self._model.all_blocks:
            raise self._damaged(key, repr(found))
        return found

    def _damaged(self, key: str, found: str) -> CheckpointError:
        model = self._model
        return CheckpointError(
            f"{model.name} is damaged: its {model.architecture}.{key} is {found}, for {model.blocks} blocks"
        )


def _single(value: float) -> float:
    """As a float of 32 bits has it."""
    return float(Value.of(FLOAT32, value).decode())


def _parts(model: GgufModel, span: Span) -> Iterator[Part]:
    for name in model.around:
        tensor = model.places[name].tensor
        if name in _ROPE:
            if (taken := model.places.get(_ROPE[name])) is None:
                raise CheckpointError(f"{model.name} is incomplete: it has {name}, and no {_ROPE[name]}")
            yield _copied(model, taken.tensor, name)
        elif name in _FILLED:
            shape = tensor.shape
            if name in ("token_embd.weight", "output.weight"):
                shape = (model.width, VOCABULARY)
            elif name == "output.bias":
                shape = (VOCABULARY,)
            yield Part.filled(name, shape, _FILLED[name])
        else:
            raise UnsupportedModelError(
                f"{model.name} has the tensor {printable_line(name)} beside its blocks, and a part of the "
                f"model would be computed without it"
            )
    for block in span:
        for name in model.of_block(block):
            renamed = f"blk.{block - span.start}.{name.split('.', 2)[2]}"
            yield _copied(model, model.places[name].tensor, renamed)


def _copied(model: GgufModel, tensor: Tensor, name: str) -> Part:
    """Raise `CheckpointError` for a type that llama.cpp would not compute with, but end the process."""
    kind = TENSOR_TYPES[tensor.type].name
    small = len(tensor.shape) == 1 or name.endswith(".bias") or "_norm." in name
    if kind in _NOT_COMPUTED or (small and kind != "F32"):
        raise CheckpointError(
            f"{model.name} is damaged: its tensor {printable_line(tensor.name)} is of the type {kind}, in "
            f"which there are no {'norms and biases' if small else 'weights'}"
        )
    return Part.copied(tensor, name)

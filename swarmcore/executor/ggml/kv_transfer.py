"""Attention caches that leave a context or come into one, as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.executor.ggml.kv_state import Bytes, CacheLayout, CacheState, Width, read_state
from swarmcore.executor.ggml.sequences import CachedSequence, Sequences
from swarmcore.executor.ggml.span_model import NoCellsError, SpanModel
from swarmcore.types import Span
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

KEYS, VALUES = "ggml.keys", "ggml.values"
"""Tensors ``[tokens, values]``: what the layers of the span keep of each token, side by side."""


def export(model: SpanModel, held: Span, entry: CachedSequence, start: int, count: int) -> tuple[Tensor, ...]:
    """As `BlockExecutor.export_cache`."""
    if start < 0 or count < 1 or start + count > entry.length:
        raise InvalidStepError(
            f"tokens {start} to {start + count} are not in a cache of {entry.length} tokens"
        )
    layout = _layout(model)
    assert entry.slot is not None and entry.span is not None
    state = model.read_sequence(entry.slot, start, start + count)
    first, last = entry.span.start - held.start, entry.span.end - held.start
    return tuple(
        Tensor(
            name,
            layout.dtype,
            (count, sum(width.nbytes for width in widths[first:last]) // ITEM_BYTES[layout.dtype]),
            np.concatenate(arrays[first:last], 1).data.cast("B"),
        )
        for name, widths, arrays in ((KEYS, layout.keys, state.keys), (VALUES, layout.values, state.values))
    )


def take_in(
    model: SpanModel,
    held: Span,
    sequences: Sequences,
    entry: CachedSequence,
    span: Span,
    start: int,
    count: int,
    tensors: Sequence[Tensor],
) -> None:
    """As `BlockExecutor.import_cache`."""
    layout = _layout(model)
    if not held.covers(span):
        raise InvalidStepError(f"blocks {span} are not loaded; this executor holds {held}")
    if not 0 <= start <= entry.length or count < 1:
        raise InvalidStepError(
            f"{count} tokens of a cache from token {start} on do not continue a sequence of "
            f"{entry.length} tokens"
        )
    first, last = span.start - held.start, span.end - held.start
    part = layout.keys[first:last], layout.values[first:last]
    expected = [
        (
            name,
            layout.dtype,
            (count, sum(width.nbytes for width in widths) // ITEM_BYTES[layout.dtype]),
            "raw",
        )
        for name, widths in zip((KEYS, VALUES), part, strict=True)
    ]
    given = [(tensor.name, tensor.dtype, tensor.shape, tensor.codec) for tensor in tensors]
    if given != expected or any(tensor.data.nbytes != tensor.decoded_nbytes for tensor in tensors):
        raise InvalidStepError(
            f"a cache laid out as {given} cannot be taken in; blocks {span} here need {expected}"
        )
    state = _of_all_layers(layout, part, first, count, tensors)
    if not state.sound(layout).all():
        raise InvalidStepError("the cache that came has values that are not finite")
    sequences.begin(entry, span)
    sequences.cut(model, entry, start)
    assert entry.slot is not None
    try:
        model.write_sequence(entry.slot, start, state)
    except NoCellsError:
        model.resize(max(model.cells * 3 // 2, sequences.cached_tokens + count))
        model.write_sequence(entry.slot, start, state)
    entry.length = start + count


def move_all(old: SpanModel, old_span: Span, new: SpanModel, new_span: Span) -> bool:
    """Let ``new`` have what ``old`` has cached of the blocks in both; return whether that was possible.

    Raise `ServerMemoryError` when there is no room.
    """
    if old.layout is None or new.layout is None:
        return False
    state = read_state(memoryview(old.whole_state()), old.layout, whole=True)
    tokens = len(state.positions)
    if not tokens:
        return True
    moved = attrs.evolve(state, keys=[], values=[])
    for block in new_span:
        there, here = block - old_span.start, block - new_span.start
        common = block in old_span
        moved.keys.append(state.keys[there] if common else _zeros(new.layout.keys[here], tokens))
        moved.values.append(state.values[there] if common else _zeros(new.layout.values[here], tokens))
    if tokens > new.cells:
        new.resize(tokens)
    new.restore(bytearray(moved.write(new.layout)))
    return True


def _layout(model: SpanModel) -> CacheLayout:
    if model.layout is None:
        raise SessionLostError("caches of this architecture do not travel: build it anew on the other server")
    return model.layout


def _of_all_layers(
    layout: CacheLayout,
    part: Sequence[Sequence[Width]],
    first: int,
    count: int,
    tensors: Sequence[Tensor],
) -> CacheState:
    arrays: list[list[Bytes]] = []
    for tensor, widths, own in zip(tensors, (layout.keys, layout.values), part, strict=True):
        layers = [_zeros(width, count) for width in widths]
        rows = np.frombuffer(tensor.data, np.uint8).reshape(count, -1)
        at = 0
        for layer, width in enumerate(own, first):
            layers[layer] = np.ascontiguousarray(rows[:, at : at + width.nbytes])
            at += width.nbytes
        arrays.append(layers)
    keys, values = arrays
    return CacheState(np.zeros(count, np.int32), [], keys, values, layout.head)


def _zeros(width: Width, tokens: int) -> Bytes:
    return np.zeros((tokens, width.nbytes), np.uint8)

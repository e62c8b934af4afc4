"""The ragged batch: new tokens of many sequences, each at its own position, packed into one row of tokens.

A batch is planned once, before it enters the span: caches are rolled back and grown, and it is looked up
where the layers will write. They then call `RaggedBatch.attend`, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarmcore.executor.torch.attention_products import attend, attend_to_pieces
from swarmcore.executor.torch.batch import AdapterUpdates, Attention
from swarmcore.executor.torch.cache_pages import rotated, stored
from swarmcore.executor.torch.cached_segment import PACKED_ROWS, CachedSegment, Reading
from swarmcore.executor.torch.kv_cache import SequenceCache

_SERIAL_VALUES = 512 * 1024
"""Below this many cached values, one thread attends to a sequence faster than two wake each other up."""


class RaggedBatch:
    """The batch that goes through the span: consecutive new tokens of sequences, packed in order."""

    def __init__(
        self,
        segments: Sequence[tuple[SequenceCache, int, int]],
        device: torch.device,
        *,
        first_block: int = 0,
        threads: int = 1,
        updates: AdapterUpdates | None = None,
    ) -> None:
        """``segments`` are caches with the start position and the count of their new tokens.

        The caches are of the blocks from ``first_block`` on. A sequence may come more than once, its segments
        in order. ``threads`` is what the computing thread has for one operation.
        """
        self.origin = 0
        self._first_block = first_block
        self.updates = updates
        for cache, start, count in segments:
            cache.prepare(start, start + count)
        self._layout = segments[0][0].layout
        self._segments = [CachedSegment(*segment) for segment in segments]
        self.counts = [segment.count for segment in self._segments]
        self.tokens = sum(self.counts)
        self._decode = self.tokens == len(self._segments)
        runs = [slots for segment in self._segments for slots in segment.slots]
        self._lengths = [slots[0][0].shape[2] for slots in runs]
        """How many rows go into each run of tokens, in order."""
        self._slots = [
            list(chain.from_iterable(zip(*layer, strict=True))) for layer in zip(*runs, strict=True)
        ]
        """For each layer where they go: the runs' keys, then their values, and so on."""
        self._readings: dict[object, list[Reading]] = {}
        self._threads = threads if device.type == "cpu" else 1
        positions = [torch.arange(segment.start, segment.end) for segment in self._segments]
        self.position_ids = torch.cat(positions).unsqueeze(0).to(device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        layer += self.origin - self._first_block
        if self._layout.quantised:
            query = rotated(query)
        planes = stored(self._layout, key, value)
        new = [rows for plane in planes for rows in plane.split_with_sizes(self._lengths, 2)]
        torch._foreach_copy_(self._slots[layer], new)
        heads, tokens, size = query.shape[1:]
        kv_heads = key.shape[1]
        rows = heads // kv_heads
        # One for all layers that attend alike.
        label = (how.window, how.chunk, how.bias, how.explicit, kv_heads, query.shape)
        readings = self._readings.get(label)
        if readings is None:
            readings = [segment.reading(how, query, kv_heads) for segment in self._segments]
            self._readings[label] = readings
        if self._decode:
            queries = query.transpose(1, 2).reshape(tokens, 1, kv_heads, rows, size).unbind(0)
            return self._attend_decode(layer, queries, readings, how).view(1, tokens, heads, -1)
        outputs = []
        for reading, part in zip(readings, query.split_with_sizes(self.counts, 2), strict=True):
            count = part.shape[2]
            if rows * count > PACKED_ROWS:
                keys, values = reading.one_piece(layer)
                outputs.append(attend(part, keys, values, reading.start, how, reading.unstacked_mask))
            else:
                output = _attend_few(reading, layer, part.reshape(1, kv_heads, rows * count, size), rows, how)
                outputs.append(output.view(1, heads, count, -1))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return output.transpose(1, 2)

    def _attend_decode(
        self, layer: int, queries: Sequence[torch.Tensor], readings: Sequence[Reading], how: Attention
    ) -> torch.Tensor:
        """One new token of each sequence, ``[1, key heads, rows of each, size]``."""
        outputs, serial = [], False
        kv_heads, rows, size = queries[0].shape[1:]
        try:
            for reading, query in zip(readings, queries, strict=True):
                if self._threads > 1 and (reading.length * kv_heads * size < _SERIAL_VALUES) != serial:
                    serial = not serial
                    torch.set_num_threads(1 if serial else self._threads)
                outputs.append(_attend_few(reading, layer, query, rows, how))
        finally:
            if serial:
                torch.set_num_threads(self._threads)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_few(reading: Reading, layer: int, query: torch.Tensor, rows: int, how: Attention) -> torch.Tensor:
    """``query`` is ``[1, key heads, rows of each * count, size]``, and so is the result."""
    if reading.columns is None:
        keys, values = reading.one_piece(layer)
        return scaled_dot_product_attention(query, keys, values, attn_mask=reading.mask, scale=how.scale)
    sinks = None if how.sinks is None else how.sinks.view(-1, rows)
    pieces, unseen = reading.columns.pieces(layer), reading.columns.unseen
    output = attend_to_pieces(query[0], pieces, rows, how, mask=reading.mask, unseen=unseen, sinks=sinks)
    return output.unsqueeze(0)

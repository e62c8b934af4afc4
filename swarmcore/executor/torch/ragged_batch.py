"""The ragged batch: new tokens of many sequences, each at its own position, packed into one row of tokens.

A batch is planned once, before it enters the span: caches are rolled back and grown, and the views into them
that the layers will need are made. The layers then call `RaggedBatch.attend`, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarmcore.executor.torch.batch import AdapterUpdates, Attention, attend, attend_explicitly, causal_mask
from swarmcore.executor.torch.kv_cache import SequenceCache

_PACKED_ROWS = 64
"""Up to this many query rows, the query heads that share a key head are stacked into rows instead of copying
keys and values for each of them."""

_SERIAL_VALUES = 512 * 1024
"""Below this many cached values, one thread attends to a sequence faster than two wake each other up."""


class _CachedSegment:
    """Consecutive new tokens of one sequence: its rows of the batch and its views into the cache."""

    def __init__(self, cache: SequenceCache, start: int, count: int) -> None:
        self.start, self.count, self.end = start, count, start + count
        self.new_keys, self.new_values = cache.views(start, self.end)
        self.keys, self.values = cache.views(0, self.end)
        self._masks: dict[object, torch.Tensor | None] = {}

    def mask(
        self, how: Attention, rows: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """What is added to the scores, ``[1 or heads, count, keys]``; None when nothing is.

        Made once for all layers that attend alike. ``rows`` is how many heads share a mask when stacked.
        """
        label = (how.window, how.chunk, how.bias, rows)
        if label not in self._masks:
            self._masks[label] = self._make_mask(how, rows, device, dtype)
        return self._masks[label]

    def _make_mask(
        self, how: Attention, rows: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        mask = causal_mask(self.start, self.end, how, device, dtype)
        if mask is not None and rows > 1:
            heads = mask.shape[1]
            mask = (
                mask.repeat(1, 1, rows, 1)
                if heads == 1
                else mask.reshape(1, heads // rows, -1, mask.shape[-1])
            )
        return mask


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
        self._segments = [_CachedSegment(*segment) for segment in segments]
        self.counts = [segment.count for segment in self._segments]
        self.tokens = sum(self.counts)
        self._decode = self.tokens == len(self._segments)
        self._slots = [
            keys + values
            for keys, values in zip(
                zip(*(segment.new_keys for segment in self._segments), strict=True),
                zip(*(segment.new_values for segment in self._segments), strict=True),
                strict=True,
            )
        ]
        self._threads = threads if device.type == "cpu" else 1
        positions = [torch.arange(segment.start, segment.end) for segment in self._segments]
        self.position_ids = torch.cat(positions).unsqueeze(0).to(device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        layer += self.origin - self._first_block
        new = [*key.split_with_sizes(self.counts, 2), *value.split_with_sizes(self.counts, 2)]
        torch._foreach_copy_(self._slots[layer], new)
        if self._decode:
            return self._attend_decode(layer, query, how)
        outputs = [
            _attend_segment(segment, rows, segment.keys[layer], segment.values[layer], how)
            for segment, rows in zip(self._segments, query.split_with_sizes(self.counts, 2), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _attend_decode(self, layer: int, query: torch.Tensor, how: Attention) -> torch.Tensor:
        """One new token for each sequence: no causal masks, and heads that share keys stacked into rows."""
        heads, tokens, size = query.shape[1:]
        kv_heads = self._segments[0].keys[layer].shape[1]
        rows = heads // kv_heads
        queries = query.transpose(1, 2).reshape(tokens, 1, kv_heads, rows, size).unbind(0)
        outputs = []
        explicit, serial = how.explicit, False
        try:
            for segment, row in zip(self._segments, queries, strict=True):
                keys, values = segment.keys[layer], segment.values[layer]
                if first := how.first_key(segment.start):
                    keys = keys.narrow(2, first, segment.end - first)
                    values = values.narrow(2, first, segment.end - first)
                if self._threads > 1 and (keys.numel() < _SERIAL_VALUES) != serial:
                    serial = not serial
                    torch.set_num_threads(1 if serial else self._threads)
                if explicit:
                    output = attend_explicitly(row.view(1, heads, 1, size), keys, values, None, how)
                    outputs.append(output.view(1, kv_heads, rows, -1))
                    continue
                mask = segment.mask(how, rows, row.device, row.dtype) if how.bias else None
                outputs.append(
                    scaled_dot_product_attention(row, keys, values, attn_mask=mask, scale=how.scale)
                )
        finally:
            if serial:
                torch.set_num_threads(self._threads)
        output = outputs[0] if tokens == 1 else torch.cat(outputs)
        return output.reshape(1, tokens, heads, -1)


def _attend_segment(
    segment: _CachedSegment, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attention
) -> torch.Tensor:
    """Returns ``[1, count, heads, size]``."""
    heads, count, size = query.shape[1:]
    kv_heads = keys.shape[1]
    rows = heads // kv_heads
    device, dtype = query.device, query.dtype
    if how.explicit or not 1 < rows * count <= _PACKED_ROWS:
        mask_of_head = partial(segment.mask, how, 1, device, dtype)
        return attend(query, keys, values, segment.start, how, mask_of_head).transpose(1, 2)
    if first := how.first_key(segment.start):
        keys, values = keys[:, :, first:], values[:, :, first:]
    packed = query.reshape(1, kv_heads, rows * count, size)
    mask = segment.mask(how, rows, device, dtype)
    output = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=how.scale)
    return output.reshape(1, heads, count, -1).transpose(1, 2)

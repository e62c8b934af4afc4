"""The ragged batch: new tokens of many sequences, each at its own position, packed into one row of tokens.

A batch is planned once, before it enters the span: caches are rolled back and grown, and the views into them
that the layers will need are made. The layers then call `RaggedBatch.attend`, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarmcore.executor.torch.batch import AdapterUpdates, Attention, attend_explicitly, causal_mask
from swarmcore.executor.torch.kv_cache import SequenceCache

_PACKED_ROWS = 64
"""Up to this many query rows, the query heads that share a key head are stacked into rows instead of copying
keys and values for each of them."""

_SERIAL_VALUES = 512 * 1024
"""Below this many cached values, one thread attends to a sequence faster than two wake each other up."""


class _Piece:
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
    """The batch that goes through the span: pieces of sequences, packed in order."""

    def __init__(
        self,
        pieces: Sequence[tuple[SequenceCache, int, int]],
        device: torch.device,
        *,
        first_block: int = 0,
        threads: int = 1,
        updates: AdapterUpdates | None = None,
    ) -> None:
        """``pieces`` are caches with the start position and the count of their new tokens.

        The caches are of the blocks from ``first_block`` on. A sequence may come more than once, its pieces
        in order. ``threads`` is what the computing thread has
        for one operation.
        """
        self.origin = 0
        self._first_block = first_block
        self.updates = updates
        for cache, start, count in pieces:
            cache.prepare(start, start + count)
        self._pieces = [_Piece(*piece) for piece in pieces]
        self.counts = [piece.count for piece in self._pieces]
        self.tokens = sum(self.counts)
        self._decode = self.tokens == len(self._pieces)
        self._slots = [
            keys + values
            for keys, values in zip(
                zip(*(piece.new_keys for piece in self._pieces), strict=True),
                zip(*(piece.new_values for piece in self._pieces), strict=True),
                strict=True,
            )
        ]
        self._threads = threads if device.type == "cpu" else 1
        positions = [torch.arange(piece.start, piece.end) for piece in self._pieces]
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
            _attend_piece(piece, rows, piece.keys[layer], piece.values[layer], how)
            for piece, rows in zip(self._pieces, query.split_with_sizes(self.counts, 2), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _attend_decode(self, layer: int, query: torch.Tensor, how: Attention) -> torch.Tensor:
        """One new token for each sequence: no causal masks, and heads that share keys stacked into rows."""
        heads, tokens, size = query.shape[1:]
        kv_heads = self._pieces[0].keys[layer].shape[1]
        rows = heads // kv_heads
        queries = query.transpose(1, 2).reshape(tokens, 1, kv_heads, rows, size).unbind(0)
        outputs = []
        explicit, serial = how.explicit, False
        try:
            for piece, row in zip(self._pieces, queries, strict=True):
                keys, values = piece.keys[layer], piece.values[layer]
                if first := how.first_key(piece.start):
                    keys = keys.narrow(2, first, piece.end - first)
                    values = values.narrow(2, first, piece.end - first)
                if self._threads > 1 and (keys.numel() < _SERIAL_VALUES) != serial:
                    serial = not serial
                    torch.set_num_threads(1 if serial else self._threads)
                if explicit:
                    output = attend_explicitly(row.view(1, heads, 1, size), keys, values, None, how)
                    outputs.append(output.view(1, kv_heads, rows, -1))
                    continue
                mask = piece.mask(how, rows, row.device, row.dtype) if how.bias else None
                outputs.append(
                    scaled_dot_product_attention(row, keys, values, attn_mask=mask, scale=how.scale)
                )
        finally:
            if serial:
                torch.set_num_threads(self._threads)
        output = outputs[0] if tokens == 1 else torch.cat(outputs)
        return output.reshape(1, tokens, heads, -1)


def _attend_piece(
    piece: _Piece, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attention
) -> torch.Tensor:
    """Returns ``[1, count, heads, size]``."""
    heads, count, size = query.shape[1:]
    kv_heads = keys.shape[1]
    rows = heads // kv_heads
    if first := how.first_key(piece.start):
        keys, values = keys[:, :, first:], values[:, :, first:]
    if how.explicit:
        output = attend_explicitly(query, keys, values, piece.mask(how, 1, query.device, query.dtype), how)
    elif 1 < rows * count <= _PACKED_ROWS:
        packed = query.reshape(1, kv_heads, rows * count, size)
        mask = piece.mask(how, rows, query.device, query.dtype)
        output = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=how.scale)
        output = output.reshape(1, heads, count, -1)
    else:
        causal = piece.start == 0 and not how.first_key(piece.end - 1) and how.bias is None
        mask = None if causal else piece.mask(how, 1, query.device, query.dtype)
        output = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=how.scale, enable_gqa=rows > 1
        )
    return output.transpose(1, 2)

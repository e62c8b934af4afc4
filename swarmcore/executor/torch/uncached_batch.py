"""The batch of a forward or backward pass: whole sequences from their first token on, without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import torch

from swarmcore.executor.torch.attention_products import attend
from swarmcore.executor.torch.batch import AdapterUpdates, Attention, causal_mask


class UncachedBatch:
    """Sequences packed in one row of tokens; those of one length that follow each other attend together.

    Differentiable where gradients are enabled, with respect to ``prefixes`` too.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        *,
        updates: AdapterUpdates | None = None,
        prefixes: Mapping[int, torch.Tensor] | None = None,
        prefix_tokens: int = 0,
        padding: bool = False,
    ) -> None:
        """``padding``: the rows attend to nothing, not even to themselves.

        ``prefixes`` are keys and values that every sequence begins with, for each block of the model,
        ``[2, prefix_tokens, key heads, size]``; the first token is at position ``prefix_tokens``.
        """
        self.origin = 0
        self.updates = updates
        self.tokens = sum(lengths)
        self._runs = [(len(list(run)), length) for length, run in groupby(lengths)]
        self._prefixes = prefixes or {}
        self._before = prefix_tokens
        self._padding = padding
        self._masks: dict[object, torch.Tensor | None] = {}
        positions = [torch.arange(prefix_tokens, prefix_tokens + length) for length in lengths]
        self.position_ids = torch.cat(positions).unsqueeze(0).to(device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attention
    ) -> torch.Tensor:
        if self._padding:
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        prefix = self._prefixes.get(self.origin + layer)
        first, outputs = 0, []
        for many, length in self._runs:
            queries, keys, values = (_sequences(rows, first, many, length) for rows in (query, key, value))
            if prefix is not None:
                keys, values = _after(prefix[0], keys), _after(prefix[1], values)
            if unseen := how.first_key(self._before):
                keys, values = keys[:, :, unseen:], values[:, :, unseen:]
            mask = partial(self._mask, queries, how)
            output = attend(queries, keys, values, self._before, how, mask)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            first += many * length
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.unsqueeze(0)

    def _mask(self, queries: torch.Tensor, how: Attention) -> torch.Tensor | None:
        """Made once for all layers that attend alike, and all sequences of one length."""
        length = queries.shape[2]
        label = (how.window, how.chunk, how.bias, length)
        if label not in self._masks:
            self._masks[label] = causal_mask(
                self._before, self._before + length, how, queries.device, queries.dtype
            )
        return self._masks[label]


def _sequences(rows: torch.Tensor, first: int, many: int, length: int) -> torch.Tensor:
    """Sequences of one length, ``[many, heads, length, size]``, of ``[1, heads, tokens, size]``."""
    heads, _, size = rows.shape[1:]
    return rows[0].narrow(1, first, many * length).view(heads, many, length, size).transpose(0, 1)


def _after(prefix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``prefix``, ``[tokens, heads, size]``, before the tokens of every sequence."""
    before = prefix.to(rows.dtype).transpose(0, 1)
    return torch.cat((before.expand(rows.shape[0], -1, -1, -1), rows), 2)

"""BLOOM's attention on a ragged batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.bloom import modeling_bloom

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention


class AlibiBias:
    """What is added to the scores of a key at each position, kept for as many positions as were asked for.

    The softmax does not care about a constant, so the bias of a key is its slope times its position,
    whatever the query. The layers of a span share one object, so that masks are made once for all of them.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        """``make(count)`` gives the biases of the first ``count`` positions, ``[heads, count]``.

        They are to be as the model has them, rounding to its dtype included.
        """
        self._make = make
        self._table = torch.empty(1, 0, 1, 0)

    def keys(self, count: int) -> torch.Tensor:
        """float32 ``[1, heads, 1, count]``."""
        if count > self._table.shape[-1]:
            with torch.inference_mode(False):  # the backward pass has to be able to save it
                self._table = self._make(max(1024, 2 * count)).float()[None, :, None, :]
        return self._table[..., :count]


class RaggedBloomAttention(nn.Module):
    """In place of ``BloomAttention``, with its projections."""

    def __init__(self, attention: Any, bias: AlibiBias) -> None:
        super().__init__()
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.layer_idx, self.num_heads = attention.layer_idx, attention.num_heads
        self.how = Attention(scale=attention.inv_norm_factor, bias=bias)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        fused = self.query_key_value(hidden_states).view(1, tokens, self.num_heads, 3, -1)
        query, key, value = fused.transpose(1, 2).unbind(3)
        output = current_batch().attend(self.layer_idx, query, key, value, self.how)
        return self.dense(output.reshape(1, tokens, -1)) + residual, None


def replace_attention(base: Any) -> None:
    """Give the blocks of a ``BloomModel`` attention on the current batch."""
    heads, (dtype, device) = base.num_heads, (base.dtype, base.device)

    # It outlives the base model, so it must not keep it: blocks may be dropped.
    def biases(count: int) -> torch.Tensor:
        mask = torch.ones(1, count, device=device, dtype=torch.float32)
        alibi: torch.Tensor = modeling_bloom.build_alibi_tensor(mask, heads, dtype)
        return alibi.view(heads, count)

    bias = AlibiBias(biases)
    for block in base.h:
        block.self_attention = RaggedBloomAttention(block.self_attention, bias)

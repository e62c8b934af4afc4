"""BLOOM's attention on a ragged batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bloom import modeling_bloom

from swarmcore.executor.torch.alibi import AlibiBias
from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention


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

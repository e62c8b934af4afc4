"""Falcon's attention on a ragged batch: rotary or ALiBi; multi-query, grouped-query or multi-head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.falcon import modeling_falcon

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention
from swarmcore.executor.torch.families.bloom import AlibiBias


class RaggedFalconAttention(nn.Module):
    """In place of ``FalconAttention``, with its projections."""

    def __init__(self, attention: Any, bias: AlibiBias | None) -> None:
        super().__init__()
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.kv_heads = attention.num_kv_heads
        self.how = Attention(scale=attention.inv_norm_factor, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        # All three styles lay out each key head's query heads, then its key, then its value.
        fused = self.query_key_value(hidden_states).view(1, tokens, self.kv_heads, -1, self.head_dim)
        query = fused[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
        key, value = fused[:, :, :, -2].transpose(1, 2), fused[:, :, :, -1].transpose(1, 2)
        if self.how.bias is None:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        output = current_batch().attend(self.layer_idx, query, key, value, self.how)
        return self.dense(output.reshape(1, tokens, -1)), None


def replace_attention(base: Any) -> None:
    """Give the blocks of a ``FalconModel`` attention on the current batch."""
    heads, (dtype, device) = base.num_heads, (base.dtype, base.device)
    scale = base.h[0].self_attention.inv_norm_factor

    def biases(count: int) -> torch.Tensor:
        mask = torch.ones(1, count, dtype=torch.long, device=device)
        alibi: torch.Tensor = modeling_falcon.build_alibi_tensor(mask, heads, dtype)
        return alibi.view(heads, count).mul_(scale)

    bias = AlibiBias(biases) if base.use_alibi else None
    for block in base.h:
        block.self_attention = RaggedFalconAttention(block.self_attention, bias)

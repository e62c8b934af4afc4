"""Llama 4's layers without rotary embedding on a ragged batch: their queries grow with the position."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

from swarmcore.executor.torch.attention import current_batch


class RaggedLlama4Attention(Llama4TextAttention):  # type: ignore[misc]
    """In place of ``Llama4TextAttention``, which counts positions from the first token of the batch."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, attention_mask: Any = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        query, key, value = (
            project(hidden_states).view(1, tokens, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = current_batch().position_ids.view(1, 1, tokens, 1).float()
        scales = torch.log1p(torch.floor((positions + 1) / self.floor_scale)) * self.attn_scale + 1
        query = (query * scales).to(query.dtype)
        attend: Any = AttentionInterface()[self.config._attn_implementation]
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(output.reshape(1, tokens, -1)), None


def replace_attention(base: Any) -> None:
    """Give the layers of a ``Llama4TextModel`` that need it the positions of the current batch."""
    for layer in base.layers:
        attention = layer.self_attn
        if attention.attn_temperature_tuning and not attention.use_rope and not hasattr(attention, "qk_norm"):
            attention.__class__ = RaggedLlama4Attention

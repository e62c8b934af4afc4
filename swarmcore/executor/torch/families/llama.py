"""Llamas that are different: Llama 4, whose layers without rotary embedding scale queries by their position,
and DiffLlama, whose attention is differential."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention


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


def replace_llama4(base: Any) -> None:
    """Give the layers of a ``Llama4TextModel`` that need it the positions of the current batch."""
    for layer in base.layers:
        attention = layer.self_attn
        if attention.attn_temperature_tuning and not attention.use_rope and not hasattr(attention, "qk_norm"):
            attention.__class__ = RaggedLlama4Attention


class RaggedDiffLlamaAttention(DiffLlamaAttention):  # type: ignore[misc]
    """In place of ``DiffLlamaAttention``, by ``__class__``: its projections stay where they are.

    The family attends twice, with the same scores to two halves of the values. Here each key head has both
    halves as one value of twice the size.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        query, key, value = (
            project(hidden_states).view(1, tokens, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        both = torch.cat(value.chunk(2, dim=1), dim=-1).repeat(1, 2, 1, 1)
        output = current_batch().attend(self.layer_idx, query, key, both, Attention(self.scaling))
        first, second = output.chunk(2, dim=2)
        weights = [
            torch.exp(torch.sum(one * other, dim=-1, dtype=torch.float32)).to(query.dtype)
            for one, other in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        ]
        mixed = first - (weights[0] - weights[1] + self.lambda_init) * second
        normed = (1 - self.lambda_init) * self.groupnorm(mixed)
        return self.o_proj(normed.reshape(1, tokens, -1)), None


def replace_diffllama(base: Any) -> None:
    """Give the blocks of a ``DiffLlamaModel`` attention on the current batch."""
    for layer in base.layers:
        layer.self_attn.__class__ = RaggedDiffLlamaAttention

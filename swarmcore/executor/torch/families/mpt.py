"""MPT's attention on a ragged batch, with its ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpt import modeling_mpt

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention
from swarmcore.executor.torch.families.bloom import AlibiBias


class RaggedMptAttention(modeling_mpt.MptAttention):  # type: ignore[misc]
    """In place of ``MptAttention``, by ``__class__``, so that its projections stay where they are."""

    how: Attention

    def forward(self, hidden_states: torch.Tensor, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        tokens = fused.shape[1]
        query, key, value = (
            part.view(1, tokens, self.n_heads, self.head_dim).transpose(1, 2)
            for part in fused.chunk(3, dim=2)
        )
        output = current_batch().attend(self.layer_idx, query, key, value, self.how)
        return self.out_proj(output.reshape(1, tokens, -1)), None


class RaggedMptModel(modeling_mpt.MptModel):  # type: ignore[misc]
    """Without the biases and masks that it makes for all positions at once."""

    def forward(self, inputs_embeds: torch.Tensor, **others: Any) -> BaseModelOutput:
        hidden = inputs_embeds
        for block in self.blocks:
            hidden = block(hidden, position_bias=None, attention_mask=None)[0]
        return BaseModelOutput(last_hidden_state=self.norm_f(hidden))


def replace_attention(base: Any) -> None:
    """Give the blocks of an ``MptModel`` attention on the current batch."""
    heads, device = base.num_heads, base.device

    def biases(count: int) -> torch.Tensor:
        alibi: torch.Tensor = modeling_mpt.build_mpt_alibi_tensor(heads, count, device=device)
        return alibi.view(heads, count)

    bias = AlibiBias(biases)
    base.__class__ = RaggedMptModel
    for layer, block in enumerate(base.blocks):
        block.attn.__class__ = RaggedMptAttention
        block.attn.layer_idx = layer
        block.attn.how = Attention(block.attn.softmax_scale, bias=bias)

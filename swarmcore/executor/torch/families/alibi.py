"""Families with ALiBi on a ragged batch: BLOOM, MPT, and Falcon, which has it or rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt import modeling_mpt

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


def replace_bloom(base: Any) -> None:
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


def replace_falcon(base: Any) -> None:
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


def replace_mpt(base: Any) -> None:
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

"""Families with sinusoidal positions, which the client adds: CTRL and XGLM.

CTRL's blocks themselves use the attention interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.ctrl.modeling_ctrl import CTRLModel
from transformers.models.xglm.modeling_xglm import XGLMAttention, XGLMModel

from swarmcore.executor.torch.attention import current_batch
from swarmcore.executor.torch.batch import Attention


class RaggedCTRLModel(CTRLModel):  # type: ignore[misc]
    """Without the scaling and the positions, which the client has done; its blocks use the interface."""

    def forward(self, inputs_embeds: torch.Tensor, **others: Any) -> BaseModelOutput:
        hidden = inputs_embeds
        for block in self.h:
            hidden = block(hidden, attention_mask=None)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden))


def replace_ctrl(base: Any) -> None:
    """Have a ``CTRLModel`` take hidden states as they are between blocks."""
    base.__class__ = RaggedCTRLModel


class RaggedXGLMAttention(XGLMAttention):  # type: ignore[misc]
    """In place of ``XGLMAttention``, by ``__class__``, so that its projections stay where they are."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        query, key, value = (
            project(hidden_states).view(1, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = current_batch().attend(self.layer_idx, query, key, value, Attention(self.scaling))
        return self.out_proj(output.reshape(1, tokens, -1)), None


class RaggedXGLMModel(XGLMModel):  # type: ignore[misc]
    """Without the positions, which the client has added."""

    def forward(self, inputs_embeds: torch.Tensor, **others: Any) -> BaseModelOutput:
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, None, None)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden))


def replace_xglm(base: Any) -> None:
    """Give the blocks of an ``XGLMModel`` attention on the current batch."""
    base.__class__ = RaggedXGLMModel
    for layer, block in enumerate(base.layers):
        block.self_attn.__class__ = RaggedXGLMAttention
        block.self_attn.layer_idx = layer

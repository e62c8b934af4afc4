"""CTRL: only what its model does around the blocks. The blocks themselves use the attention interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.ctrl.modeling_ctrl import CTRLModel


class RaggedCTRLModel(CTRLModel):  # type: ignore[misc]
    """Without the scaling and the positions, which the client has done; its blocks use the interface."""

    def forward(self, inputs_embeds: torch.Tensor, **others: Any) -> BaseModelOutput:
        hidden = inputs_embeds
        for block in self.h:
            hidden = block(hidden, attention_mask=None)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden))


def replace_attention(base: Any) -> None:
    """Have a ``CTRLModel`` take hidden states as they are between blocks."""
    base.__class__ = RaggedCTRLModel

"""Families that need code of their own to run on a ragged batch: a module each, and a table by model type.

All others attend through ``AttentionInterface`` (`swarmcore.executor.torch.attention`) and need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmcore.executor.torch.families import bloom, ctrl, diffllama, falcon, gpt, llama4, mpt, xglm

REPLACE_ATTENTION: dict[str, Callable[[Any], None]] = {
    "bloom": bloom.replace_attention,
    "codegen": gpt.replace_gptj,
    "ctrl": ctrl.replace_attention,
    "diffllama": diffllama.replace_attention,
    "falcon": falcon.replace_attention,
    "gpt_neo": gpt.replace_gpt_neo,
    "gpt_neox_japanese": gpt.replace_gpt_neox_japanese,
    "gptj": gpt.replace_gptj,
    "llama4_text": llama4.replace_attention,
    "mpt": mpt.replace_attention,
    "openai-gpt": gpt.replace_openai_gpt,
    "xglm": xglm.replace_attention,
}
"""Given a base model, has its blocks call the current batch."""

OWN_MASKS = frozenset({"falcon"})
"""Families that change masks on the way to their blocks, and whose replacements know what tokens see."""

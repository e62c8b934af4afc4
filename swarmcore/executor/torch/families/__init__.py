"""Families that need code of their own to run on a ragged batch: a module each, and a table by model type.

All others attend through ``AttentionInterface`` (`swarmcore.executor.torch.attention`) and need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swarmcore.executor.torch.families import alibi, gpt, llama, sinusoidal

REPLACE_ATTENTION: dict[str, Callable[[Any], None]] = {
    "bloom": alibi.replace_bloom,
    "codegen": gpt.replace_gptj,
    "ctrl": sinusoidal.replace_ctrl,
    "diffllama": llama.replace_diffllama,
    "falcon": alibi.replace_falcon,
    "gpt_neo": gpt.replace_gpt_neo,
    "gpt_neox_japanese": gpt.replace_gpt_neox_japanese,
    "gptj": gpt.replace_gptj,
    "llama4_text": llama.replace_llama4,
    "mpt": alibi.replace_mpt,
    "openai-gpt": gpt.replace_openai_gpt,
    "xglm": sinusoidal.replace_xglm,
}
"""Given a base model, has its blocks call the current batch."""

OWN_MASKS = frozenset({"falcon"})
"""Families that change masks on the way to their blocks, and whose replacements know what tokens see."""

"""Families that need code of their own to run on a ragged batch: modules, and a table by model type.

All others attend through ``AttentionInterface`` (`swarmcore.executor.torch.attention`) and need none. A
family's module is imported when a model of it is: each loads some of Transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_REPLACEMENTS = {
    "bloom": ("alibi", "replace_bloom"),
    "codegen": ("gpt", "replace_gptj"),
    "ctrl": ("sinusoidal", "replace_ctrl"),
    "diffllama": ("llama", "replace_diffllama"),
    "falcon": ("alibi", "replace_falcon"),
    "gpt_neo": ("gpt", "replace_gpt_neo"),
    "gpt_neox_japanese": ("gpt", "replace_gpt_neox_japanese"),
    "gptj": ("gpt", "replace_gptj"),
    "llama4_text": ("llama", "replace_llama4"),
    "mpt": ("alibi", "replace_mpt"),
    "openai-gpt": ("gpt", "replace_openai_gpt"),
    "xglm": ("sinusoidal", "replace_xglm"),
}

OWN_MASKS = frozenset({"falcon"})
"""Families that change masks on the way to their blocks, and whose replacements know what tokens see."""


def attention_replacement(model_type: str) -> Callable[[Any], None] | None:
    """What, given a base model of this type, has its blocks call the current batch; None for most types."""
    if model_type not in _REPLACEMENTS:
        return None
    module, name = _REPLACEMENTS[model_type]
    replace: Callable[[Any], None] = getattr(import_module(f"{__name__}.{module}"), name)
    return replace

"""Options of PEFT's configs: those that are honoured here, and whatever else is switched on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from swarmcore.errors import AdapterError

LORA, PREFIX, PROMPT = "LORA", "PREFIX_TUNING", "PROMPT_TUNING"

_OF_ALL_KINDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
_OF_PROMPTS = frozenset(
    {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
)
_HONOURED = {
    LORA: frozenset(
        {
            # What is computed.
            "alpha_pattern",
            "fan_in_fan_out",
            "lora_alpha",
            "lora_dropout",
            "r",
            "rank_pattern",
            "use_rslora",
            # Which layers, told by the tensors or by the modules that PEFT has put in their places.
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
            "target_modules",
            "ensure_weight_tying",
            # How it was started, or what is of use with other options only.
            "corda_config",
            "eva_config",
            "init_lora_weights",
            "loftq_config",
            "lora_ga_config",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
        }
    ),
    PREFIX: _OF_PROMPTS | {"encoder_hidden_size", "init_weights", "prefix_projection"},
    PROMPT: _OF_PROMPTS
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"},
}
_SHOWN = 60


def not_honoured(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The options of a config of that kind that are switched on and not honoured here, with their values.

    Options of newer versions of PEFT are among them: nobody knows what they change.
    """
    found = {
        name: value
        for name, value in options.items()
        if value and name not in _OF_ALL_KINDS and name not in _HONOURED[kind]
    }
    if options.get("bias", "none") == "none":
        found.pop("bias", None)
    return [name if value is True else f"{name}={repr(value)[:_SHOWN]}" for name, value in found.items()]


def check_lora_config(config: Any) -> None:
    """Raise `AdapterError` for a ``peft.LoraConfig`` with an option that remote blocks do not honour.

    Whole layers (``modules_to_save``) and rows of the embeddings (``trainable_token_indices``) are PEFT's own
    business there, since they are those of parts that are here.
    """
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if value != default and field.name != "trainable_token_indices":
            changed[field.name] = value if value else f"{value!r}"
    if found := not_honoured(LORA, changed):
        raise AdapterError(
            f"a LoraConfig with {', '.join(found)} asks for what servers do not compute: leave that out"
        )
    if config.lora_dropout and not config.inference_mode:
        raise AdapterError(
            f"lora_dropout={config.lora_dropout} would have to be drawn by the servers, inside of their "
            f"blocks: leave it at 0, and use weight decay"
        )

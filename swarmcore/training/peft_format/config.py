"""``adapter_config.json``: what kind an adapter is of, and whether it can be used with remote blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import attrs
import msgspec

from swarmcore.errors import AdapterError
from swarmcore.training.lora import lora_scaling

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


CONFIG_FILE = "adapter_config.json"

HEAD_LAYERS = ("score", "classifier")
"""What the families call the layer of a classification head."""

_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the model's own weights as they are."""


_Value = TypeVar("_Value", int, float)


@attrs.frozen
class AdapterConfig:
    """The settings of an adapter that matter once it is trained."""

    kind: str
    task: str
    base_model: str
    """What the model is called that it was made for; may be empty."""
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    dropout: float = 0.0
    ranks: Mapping[str, int] = attrs.field(factory=dict)
    """Of projections whose path matches a pattern."""
    alphas: Mapping[str, float] = attrs.field(factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raise `AdapterError` when there is none, it is damaged, or its kind or an option cannot be used."""
        file = folder / CONFIG_FILE
        try:
            raw = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        except FileNotFoundError as exc:
            raise AdapterError(
                f"{folder} has no {CONFIG_FILE}: it is no adapter in PEFT's format; pass the folder that "
                f"save_adapter or PEFT's save_pretrained wrote"
            ) from exc
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise AdapterError(f"{file} cannot be read, copy it again: {exc}") from exc
        kind = raw.get("peft_type")
        if kind not in (LORA, PREFIX, PROMPT):
            raise AdapterError(
                f"{folder} is an adapter of the kind {kind}; only {LORA}, {PREFIX} and {PROMPT} can be used "
                f"with remote blocks: train one of these"
            )
        _check_head(raw, folder)
        common = {
            "kind": kind,
            "task": str(raw.get("task_type") or ""),
            "base_model": str(raw.get("base_model_name_or_path") or ""),
        }
        _check_options(raw, kind, folder)
        if kind != LORA:
            return cls(**common)
        try:
            fields = msgspec.convert(raw, _LoraFields)
        except msgspec.ValidationError as exc:
            raise AdapterError(f"{file} is damaged: {exc}") from exc
        return cls(
            **common,
            rank=fields.r,
            alpha=fields.lora_alpha,
            rslora=fields.use_rslora,
            dropout=fields.lora_dropout,
            ranks=fields.rank_pattern or {},
            alphas=fields.alpha_pattern or {},
        )

    @property
    def scaling(self) -> float:
        """Of projections without a pattern of their own."""
        return lora_scaling(self.rank, self.alpha, self.rslora) if self.kind == LORA else 1.0

    def rank_of(self, key: str) -> int:
        """The rank for the projection with the path ``key``."""
        return _by_pattern(self.ranks, key, self.rank)

    def scaling_of(self, key: str) -> float:
        return lora_scaling(self.rank_of(key), _by_pattern(self.alphas, key, self.alpha), self.rslora)


class _LoraFields(msgspec.Struct):
    r: int
    lora_alpha: float
    use_rslora: bool = False
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if min([self.r, *(self.rank_pattern or {}).values()]) < 1:
            raise ValueError("ranks must be 1 or more")
        if not self.lora_alpha:
            raise ValueError("with a lora_alpha of 0 it has no effect")


def _check_head(raw: Mapping[str, Any], folder: Path) -> None:
    saved = raw.get("modules_to_save") or ()
    other = (
        sorted(set(map(str, saved)) - set(HEAD_LAYERS)) if isinstance(saved, list | tuple) else [str(saved)]
    )
    if other:
        raise AdapterError(
            f"{folder} has whole layers of its own ({', '.join(other)}); of these only a classification head "
            f"can be used in this way: peft.PeftModel.from_pretrained(model, folder) on the remote model "
            f"takes those of the embeddings and the head too, or train it again without modules_to_save"
        )


def _check_options(raw: Mapping[str, Any], kind: str, folder: Path) -> None:
    if found := not_honoured(kind, raw):
        what = "variant of LoRA" if kind == LORA else f"variant of {kind}"
        raise AdapterError(
            f"{folder} is a {what} ({', '.join(found)}) that remote blocks cannot compute; train it "
            f"again without, or merge it into the model and serve that"
        )
    if kind != LORA and raw.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            f"{folder} is for a model with {raw['num_transformer_submodules']} stacks of blocks "
            f"(num_transformer_submodules), and decoders have one"
        )
    start = raw.get("init_lora_weights", True)
    if kind == LORA and start not in _HARMLESS_STARTS:
        raise AdapterError(
            f"{folder} was started with init_lora_weights={start!r}, which changes the model's own weights; "
            f"save it as a plain update, with PEFT's path_initial_model_for_weight_conversion"
        )


def _by_pattern(patterns: Mapping[str, _Value], key: str, default: _Value) -> _Value:
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        except re.error as exc:
            raise AdapterError(f"{pattern!r} in {CONFIG_FILE} is no regular expression: {exc}") from exc
    return default

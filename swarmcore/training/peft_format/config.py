"""``adapter_config.json``: what kind an adapter is of, and whether it can be used with remote blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import attrs
import msgspec

from swarmcore.errors import AdapterError
from swarmcore.training.lora import lora_scaling
from swarmcore.training.peft_format.options import LORA, PREFIX, PROMPT, not_honoured

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

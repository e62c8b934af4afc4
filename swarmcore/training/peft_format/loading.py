"""Reading adapters: whole ones, to go on training or to use them, and a server's share of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import torch

from swarmcore.errors import AdapterError
from swarmcore.training.heads import ClassificationHead, SequenceClassificationHead, TokenClassificationHead
from swarmcore.training.lora import LoraAdapter
from swarmcore.training.model_layout import ModelLayout, Projection
from swarmcore.training.peft_format.config import HEAD_LAYERS, LORA, PREFIX, PROMPT, AdapterConfig
from swarmcore.training.peft_format.tensors import AdapterTensors
from swarmcore.training.prefix import PrefixAdapter, unpack_prompt_embeddings
from swarmcore.training.prompt import SoftPrompt
from swarmcore.types import Span

PROMPT_EMBEDDINGS = "prompt_embeddings"

_UPDATE = re.compile(r"base_model\.model\.(?P<key>.+)\.(?P<part>lora_[AB])(\.default)?\.weight")
_HEAD = re.compile(rf"base_model\.(model\.)?(?P<layer>{'|'.join(HEAD_LAYERS)})\.(?P<part>weight|bias)")
_HEADS: dict[str, type[ClassificationHead]] = {
    head.task: head for head in (SequenceClassificationHead, TokenClassificationHead)
}


@attrs.frozen
class LoadedAdapter:
    """What was in a folder."""

    adapter: LoraAdapter | PrefixAdapter | SoftPrompt
    head: ClassificationHead | None
    base_model: str
    """What the model is called that it was made for; may be empty."""


def load_adapter(
    folder: str | Path, model_config: Any, *, dtype: torch.dtype = torch.float32
) -> LoadedAdapter:
    """What `save_adapter` or PEFT wrote, for the model with this Transformers config.

    Ready to be trained further, or used as it is. Weights of projections with an alpha of their own are
    rescaled so that one `BlockAdapter.scaling` is right for all. `LoraAdapter.dropout` is the file's: a
    `TunedModel` refuses to train with it until it is set to 0.

    Raise `AdapterError` for files that are missing, damaged or pickles, for kinds and options that cannot be
    used with remote blocks, and for an adapter of another model.
    """
    folder = Path(folder)
    config, layout = AdapterConfig.read(folder), ModelLayout.of(model_config)
    with AdapterTensors(folder) as tensors:
        head = _read_head(tensors, config, model_config, layout)
        adapter: LoraAdapter | PrefixAdapter | SoftPrompt
        if config.kind == LORA:
            weights = _read_updates(tensors, config, layout, layout.span(None))
            if not weights:
                raise AdapterError(f"{tensors.file} has no low-rank updates: it is damaged, copy it again")
            typed = {name: values.to(dtype) for name, values in weights.items()}
            adapter = LoraAdapter(
                typed,
                rank=config.rank,
                scaling=config.scaling,
                rslora=config.rslora,
                dropout=config.dropout,
            )
        elif config.kind == PREFIX:
            adapter = PrefixAdapter.from_prompt_embeddings(_read_prompt(tensors).to(dtype), model_config)
        else:
            values = _read_prompt(tensors)
            if values.dim() != 2 or values.shape[1] != layout.hidden_size:
                raise AdapterError(
                    f"{folder} has a soft prompt of shape {list(values.shape)}, and the model the hidden "
                    f"size {layout.hidden_size}: it was made for another model"
                )
            adapter = SoftPrompt(values.to(dtype))
    return LoadedAdapter(adapter, head, config.base_model)


def read_adapter(folder: str | Path, span: Span, model_config: Any) -> tuple[dict[str, torch.Tensor], float]:
    """The weights of an adapter for the blocks ``span``, under their names on the wire, and their scaling.

    Nothing else of the file is read; no weights where it has none for these blocks. ``model_config`` is the
    Transformers config of the whole model. A head in the file is the client's business. Raise `AdapterError`
    as `load_adapter` does, and for soft prompts, which are not of blocks.
    """
    folder = Path(folder)
    config = AdapterConfig.read(folder)
    if config.kind == PROMPT:
        raise AdapterError(
            f"{folder} is a soft prompt, which clients put before their embeddings, not servers into blocks: "
            f"load it in the client, with swarmcore.training.load_adapter"
        )
    layout = ModelLayout.of(model_config)
    span = layout.span(span)
    with AdapterTensors(folder) as tensors:
        if config.kind == LORA:
            return _read_updates(tensors, config, layout, span), config.scaling
        prefixes = unpack_prompt_embeddings(_read_prompt(tensors), layout, span)
        weights = {f"{span.start + i}.prefix": prefix.clone() for i, prefix in enumerate(prefixes)}
        return weights, config.scaling


def _read_updates(
    tensors: AdapterTensors, config: AdapterConfig, layout: ModelLayout, span: Span
) -> dict[str, torch.Tensor]:
    found: dict[Projection, dict[str, str]] = {}
    keys: dict[Projection, str] = {}
    for name in _without_head(tensors.names):
        match = _UPDATE.fullmatch(name)
        projection = layout.find(match["key"]) if match else None
        if match is None or projection is None:
            raise AdapterError(
                f"{tensors.file} has {name}, which is no low-rank update of a projection in the "
                f"{layout.blocks} blocks of a {layout.model_type} model: it was made for another model, or "
                f"is a variant of LoRA that remote blocks cannot compute"
            )
        found.setdefault(projection, {})[match["part"]] = name
        keys[projection] = match["key"]
    weights: dict[str, torch.Tensor] = {}
    for projection in layout.projections:
        if projection not in found:
            continue
        names, rank = found[projection], config.rank_of(keys[projection])
        _check_shapes(tensors, projection, names, rank)
        if projection.block in span:
            down, up = (tensors.read(names[part]) for part in ("lora_A", "lora_B"))
            ratio = config.scaling_of(keys[projection]) / config.scaling
            weights[f"{projection.name}.lora_A"] = down
            weights[f"{projection.name}.lora_B"] = up if ratio == 1 else (up.float() * ratio).to(up.dtype)
    return weights


def _check_shapes(tensors: AdapterTensors, projection: Projection, names: dict[str, str], rank: int) -> None:
    expected = {"lora_A": (rank, projection.inputs), "lora_B": (projection.outputs, rank)}
    for part, shape in expected.items():
        if part not in names:
            raise AdapterError(
                f"{tensors.file} lacks {part} of {projection.name}: it is damaged, copy it again"
            )
        actual = tensors.shape(names[part])
        if actual != shape:
            raise AdapterError(
                f"{names[part]} of {tensors.file} is {list(actual)}, and the model and adapter_config.json "
                f"take {list(shape)}: it was made for another model, or the two files do not belong together"
            )


def _read_prompt(tensors: AdapterTensors) -> torch.Tensor:
    if _without_head(tensors.names) != [PROMPT_EMBEDDINGS]:
        raise AdapterError(
            f"{tensors.file} has {', '.join(tensors.names) or 'no tensors'}, and should have "
            f"{PROMPT_EMBEDDINGS}: it is damaged, copy it again"
        )
    return tensors.read(PROMPT_EMBEDDINGS)


def _read_head(
    tensors: AdapterTensors, config: AdapterConfig, model_config: Any, layout: ModelLayout
) -> ClassificationHead | None:
    parts = {match["part"]: name for name in tensors.names if (match := _HEAD.fullmatch(name))}
    if not parts:
        return None
    kind = _HEADS.get(config.task)
    if kind is None or parts.keys() != ({"weight", "bias"} if kind.has_bias else {"weight"}):
        raise AdapterError(
            f"{tensors.file} has a head ({', '.join(parts.values())}) that does not go with its task "
            f"{config.task or 'none'}; known are {', '.join(_HEADS)}"
        )
    weight = tensors.read(parts["weight"])
    if weight.dim() != 2 or weight.shape[1] != layout.hidden_size:
        raise AdapterError(
            f"the head in {tensors.file} is {list(weight.shape)}, and the model has the hidden size "
            f"{layout.hidden_size}: it was made for another model"
        )
    head = kind.for_model(model_config, len(weight))
    values = {part: tensors.read(name).to(torch.float32) for part, name in parts.items()}
    if "bias" in values and values["bias"].shape != (len(weight),):
        raise AdapterError(f"the head's bias in {tensors.file} does not fit its weight: copy it again")
    head.linear.load_state_dict(values)
    return head


def _without_head(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _HEAD.fullmatch(name)]

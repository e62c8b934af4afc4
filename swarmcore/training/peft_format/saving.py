"""Writing adapters so that PEFT reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from swarmcore.checkpoint.storage import save_file
from swarmcore.errors import AdapterError
from swarmcore.training.adapter import BlockAdapter
from swarmcore.training.heads import ClassificationHead
from swarmcore.training.lora import LoraAdapter
from swarmcore.training.model_layout import ModelLayout, Projection
from swarmcore.training.peft_format.config import CONFIG_FILE, HEAD_LAYERS, LORA, PREFIX, PROMPT
from swarmcore.training.peft_format.loading import PROMPT_EMBEDDINGS
from swarmcore.training.peft_format.tensors import write_tensors
from swarmcore.training.prefix import PrefixAdapter, prefix_shape
from swarmcore.training.prompt import SoftPrompt


def save_adapter(
    folder: str | Path,
    adapter: BlockAdapter | SoftPrompt,
    model_config: Any,
    *,
    head: ClassificationHead | None = None,
    base_model: str = "",
) -> None:
    """Write ``adapter`` and its ``head`` into ``folder``, over what is there, in PEFT's format.

    ``model_config`` is the Transformers config of the whole model; ``base_model`` what the model is called,
    by which others find it. Each file is replaced as a whole.

    Raise `AdapterError` for combined adapters, which PEFT has no file for, for a prefix of some blocks only,
    and for one of another model; `StorageError` when the disk refuses.
    """
    folder = Path(folder)
    layout = ModelLayout.of(model_config)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model or None,
        "task_type": head.task if head else "CAUSAL_LM",
        "inference_mode": True,
        "modules_to_save": list(HEAD_LAYERS) if head else None,
    }
    if isinstance(adapter, LoraAdapter):
        tensors = _updates(adapter, layout)
        config |= _lora_config(adapter, layout)
    elif isinstance(adapter, PrefixAdapter):
        tensors = {PROMPT_EMBEDDINGS: adapter.to_prompt_embeddings(model_config)}
        heads, size = prefix_shape(layout)
        config |= _prompt_config(PREFIX, adapter.prefix_tokens, layout, heads=heads, width=heads * size)
        config |= {"encoder_hidden_size": heads * size, "prefix_projection": False}
    elif isinstance(adapter, SoftPrompt):
        if adapter.hidden_size != layout.hidden_size:
            raise AdapterError(
                f"the soft prompt has the hidden size {adapter.hidden_size}, and the model "
                f"{layout.hidden_size}: it was made for another model"
            )
        tensors = {PROMPT_EMBEDDINGS: adapter.embeddings}
        heads = int(model_config.get_text_config(decoder=True).num_attention_heads)
        config |= _prompt_config(PROMPT, adapter.tokens, layout, heads=heads, width=layout.hidden_size)
        config |= {"prompt_tuning_init": "RANDOM"}
    else:
        raise AdapterError(
            f"PEFT has no file for a {type(adapter).__name__}: save each of its parts in a folder of its own"
        )
    if head is not None:
        # A prompt leaves the model as it is, where an update wraps it once more.
        prefix = "base_model.model" if isinstance(adapter, LoraAdapter) else "base_model"
        tensors |= {f"{prefix}.{head.name}.{part}": value for part, value in head.linear.named_parameters()}
    write_tensors(folder, tensors)
    save_file(folder / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(dict(sorted(config.items())))))


def _updates(adapter: LoraAdapter, layout: ModelLayout) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{layout.block_list}.{name}.weight": weight
        for name, weight in adapter.named_weights().items()
    }


def _lora_config(adapter: LoraAdapter, layout: ModelLayout) -> dict[str, Any]:
    ranks = _ranks(adapter, layout)
    other = {layout.key(p).replace(".", r"\."): rank for p, rank in ranks.items() if rank != adapter.rank}
    return {
        "peft_type": LORA,
        "r": adapter.rank,
        "lora_alpha": _whole(adapter.alpha_of(adapter.rank)),
        "use_rslora": adapter.rslora,
        "rank_pattern": other,
        "alpha_pattern": {key: _whole(adapter.alpha_of(rank)) for key, rank in other.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(projection.transposed for projection in ranks),
        "init_lora_weights": True,
        **_targets(ranks, layout),
    }


def _ranks(adapter: LoraAdapter, layout: ModelLayout) -> dict[Projection, int]:
    ranks = {}
    for name, weight in adapter.named_weights().items():
        path, _, part = name.rpartition(".")
        projection = layout.find(f"{layout.block_list}.{path}")
        size = None if projection is None else projection.inputs if part == "lora_A" else projection.outputs
        if projection is None or weight.shape[1 if part == "lora_A" else 0] != size:
            raise AdapterError(
                f"{name} {list(weight.shape)} does not fit a projection of the {layout.model_type} model: "
                f"the adapter was made for another one"
            )
        ranks[projection] = weight.shape[0 if part == "lora_A" else 1]
    return ranks


def _targets(chosen: Mapping[Projection, int], layout: ModelLayout) -> dict[str, Any]:
    """PEFT's words for exactly these projections."""
    modules = sorted({projection.module for projection in chosen})
    blocks = sorted({projection.block for projection in chosen})
    if set(layout.select(modules, blocks)) != set(chosen):
        return {"target_modules": sorted(map(layout.key, chosen)), "layers_to_transform": None}
    some = len(blocks) < layout.blocks
    return {"target_modules": modules, "layers_to_transform": blocks if some else None}


def _prompt_config(kind: str, tokens: int, layout: ModelLayout, *, heads: int, width: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "num_virtual_tokens": tokens,
        "num_layers": layout.blocks,
        "num_attention_heads": heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }


def _whole(number: float) -> int | float:
    # A scaling times its rank may be off by the last bit.
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number

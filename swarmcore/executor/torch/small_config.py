"""A config made small: the same layers and flags, in widths and lengths that take no time to run.

What is kept: the number of blocks, the kind of each, every flag and factor. What is made small: widths,
counts of heads and experts (but not whether heads share keys), the vocabulary, and all lengths at which a
layer begins to compute otherwise, so that a few tokens are past them.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 128
WINDOW = 4
"""What windows and chunks are cut to."""
_ROPE_LENGTH = 8
_NARROW_ENOUGH = 5_000_000
"""Configs of that many parameters at most keep their widths."""

_WINDOWS = re.compile(r"(.*_)?(window|window_size|chunk_size)")
_SOFT_CAP = re.compile(r".*soft_?cap.*")
_TOKEN_ID = re.compile(r"(pad|bos|eos|sep|decoder_start)_token_id")

_WIDTHS = {
    "intermediate_size": 96, "intermediate_size_mlp": 96, "dense_intermediate_size": 96, "ffn_dim": 96,
    "ffn_hidden_size": 96, "decoder_ffn_dim": 96, "block_ff_dim": 96, "n_inner": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "num_experts": 8, "num_local_experts": 8, "moe_num_experts": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_head_dim": 24, "v_head_dim": 16, "swa_v_head_dim": 16, "rotary_dim": 8,
    "hidden_size_per_layer_input": 8, "laurel_rank": 8,
}  # fmt: skip
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_DEPTHS = {"num_hidden_layers", "num_layers", "num_blocks", "encoder_layers", "depth"}
_PARTS = ("attn_config", "ffn_config")
"""Configs within the config, of one text model."""
_PART_WIDTHS = {"kv_n_heads": 2, "moe_top_k": 2}
_HEAD_COUNTS = {
    "num_attention_heads": ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"),
    "swa_num_attention_heads": ("swa_num_key_value_heads",),
}
_HEAD_SIZES = ("head_dim", "global_head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "d_head")
_HEAD_SIZE = 16
_HIDDEN_SIZES = ("hidden_size", "word_embed_proj_dim", "embedding_size", "hidden_dim", "ffn_hidden")


def small_config(config: Any) -> Any:
    """A copy of the text config ``config`` for a model that is small but computes in the same ways."""
    small, narrow = copy.deepcopy(config), is_narrow(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    for name, value in vars(config).items():
        if _WINDOWS.fullmatch(name):
            setattr(small, name, _at_most(value, WINDOW))
        elif _SOFT_CAP.fullmatch(name) and isinstance(value, int | float):
            setattr(small, name, min(float(value), 1.0))  # so that small scores reach it
        elif _TOKEN_ID.fullmatch(name) and isinstance(value, int):
            setattr(small, name, min(max(value, 0), 2))
        elif _TOKEN_ID.fullmatch(name) and isinstance(value, list):
            setattr(small, name, [1])
        elif name in _VOCABULARIES:
            setattr(small, name, _at_most(value, VOCABULARY))
        elif name == "floor_scale":
            setattr(small, name, _at_most(value, WINDOW))
    for part in vars(small).values():
        if isinstance(part, PretrainedConfig):  # towers that are built with the text model
            for name in _DEPTHS & vars(part).keys():
                setattr(part, name, _at_most(getattr(part, name), 2))
    if not narrow:
        layers = config.to_dict().get("per_layer_config") or {}
        _make_narrow(small)
        if layers:
            small.per_layer_config = {int(layer): _narrow_layer(own) for layer, own in layers.items()}
    if isinstance(getattr(small, "rope_parameters", None), dict):
        own = vars(small)  # some configs give a value for each layer, and raise for the one of all
        size = own.get("qk_rope_head_dim") or own.get("head_dim") or _HEAD_SIZE
        small.rope_parameters = _short_rope(small.rope_parameters, int(size), cut=not narrow)
    return small


def is_narrow(config: Any) -> bool:
    """Whether the model is so small that its widths are kept."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = [getattr(config, name, None) or 1 for name in ("num_experts", "n_routed_experts")]
    sizes = config.num_hidden_layers, config.hidden_size, inner, *experts
    if not all(isinstance(size, int) for size in sizes):
        return False
    block = config.hidden_size * (4 * config.hidden_size + 3 * inner * max(experts))
    return bool(config.num_hidden_layers * block <= _NARROW_ENOUGH)


def _make_narrow(config: Any) -> None:
    per_head = _HEAD_SIZE
    heads = config.num_attention_heads
    count = 4 if heads & (heads - 1) == 0 else 6  # ALiBi's slopes depend on whether it is a power of two
    for queries, keys in _HEAD_COUNTS.items():
        old = getattr(config, queries, None)
        if not isinstance(old, int):
            continue
        for name in keys:
            # Some configs that give single layers their own raise for the one of all others.
            shared = vars(config).get(name) or getattr(config, name, None)
            if isinstance(shared, int):
                setattr(config, name, count if shared == old else 1 if shared == 1 else 2)
        setattr(config, queries, count)
    for name in _HIDDEN_SIZES:
        if name in vars(config) or name in getattr(config, "attribute_map", {}):
            value = getattr(config, name, None)
            if isinstance(value, int):
                setattr(config, name, count * per_head)
    for name in _HEAD_SIZES:
        if isinstance(vars(config).get(name), int):
            setattr(
                config, name, 8 if name == "head_dim" and hasattr(config, "qk_rope_head_dim") else per_head
            )
    for name, width in _WIDTHS.items():
        if name in vars(config):
            setattr(config, name, _at_most(getattr(config, name), width))
    for part in (vars(config).get(name) for name in _PARTS):
        for name, width in {**_WIDTHS, **_PART_WIDTHS, "hidden_size": count * per_head}.items():
            if part is not None and name in vars(part):
                setattr(part, name, _at_most(getattr(part, name), width))


def _narrow_layer(own: dict[str, Any]) -> dict[str, Any]:
    """What one layer has in place of the config's values."""
    small = {name: _at_most(value, _WIDTHS.get(name, value)) for name, value in own.items()}
    for name in small.keys() & set(_HEAD_SIZES):
        small[name] = 2 * _HEAD_SIZE
    for name in small.keys() & set(_HEAD_COUNTS["num_attention_heads"]):
        small[name] = _at_most(own[name], 2)
    return small


def _at_most(value: Any, limit: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_at_most(entry, limit) for entry in value)
    return limit if type(value) is int and value > limit else value


def _short_rope(rope: dict[str, Any], head_size: int, *, cut: bool) -> dict[str, Any]:
    """Rope parameters, those of each layer type included, for heads of ``head_size``."""
    short = {
        key: _short_rope(value, head_size, cut=cut) if isinstance(value, dict) else value
        for key, value in rope.items()
    }
    kind = str(rope.get("rope_type", ""))
    if "dynamic" not in kind and kind != "longrope" and "original_max_position_embeddings" in rope:
        short["original_max_position_embeddings"] = _ROPE_LENGTH
    if cut:
        pairs = int(head_size * float(rope.get("partial_rotary_factor") or 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if isinstance(rope.get(name), list):
                short[name] = rope[name][:pairs]
        if isinstance(rope.get("mrope_section"), list):
            third = pairs // 3
            short["mrope_section"] = [pairs - 2 * third, third, third]
    return short

"""Tiny models with random weights, of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 128

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_IDS = {"eos_token_id": 1, "bos_token_id": 2}
_HEADS_OF_16 = {**SIZES, "head_dim": 16}
_SLIDING = {**_HEADS_OF_16, "sliding_window": 8}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 256, **_IDS}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    **_IDS,
}


def _rope(kind: str, factor: float, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, "factor": factor, **parameters}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {**SIZES, "rope_parameters": _rope("linear", 2.0)}),
    "llama-dynamic": ("llama", {**SIZES, "rope_parameters": _rope("dynamic", 2.0)}),
    "llama-llama3": ("llama", {**SIZES, "rope_parameters": _rope("llama3", 8.0, **_LLAMA3)}),
    "llama-yarn": (
        "llama",
        {**SIZES, "rope_parameters": _rope("yarn", 4.0, original_max_position_embeddings=64)},
    ),
    "mistral": ("mistral", _SLIDING),
    "qwen2": ("qwen2", SIZES),
    "qwen2-sliding": (
        "qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", _HEADS_OF_16),
    "gemma2": ("gemma2", {**_SLIDING, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_SLIDING, "num_hidden_layers": 7}),
    "gemma4": (
        "gemma4_text",
        {**_SLIDING, "hidden_size_per_layer_input": 0, "global_head_dim": 32, "attention_k_eq_v": True}
        | {
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        },
    ),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4, "output_router_logits": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_HEADS_OF_16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "gpt_oss": ("gpt_oss", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {**SIZES, "sliding_window": 8}),
    "phimoe": ("phimoe", {**SIZES, "sliding_window": 8, "num_local_experts": 2}),
    "phi3-longrope": (
        "phi3",
        {
            **SIZES,
            "original_max_position_embeddings": 64,
            "rope_parameters": _rope("longrope", 4.0, **_LONG),
        },
    ),
    "nanochat": ("nanochat", SIZES),
    "olmo2": ("olmo2", SIZES),
    "granite": (
        "granite",
        {**SIZES, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 8.0},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2}
        | {"topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 2}
        | {"kv_lora_rank": 16, "q_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-by-index": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 5, "n_head": 4, **_IDS}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 5, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 2], [["local"], 1]], **_IDS},
    ),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 5, "n_heads": 4, **_IDS}),
    "xglm": (
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 5, "attention_heads": 4, "ffn_dim": 96}
        | {"pad_token_id": 0, **_IDS},
    ),
    "diffllama": ("diffllama", SIZES),
    "llama4": (
        "llama4_text",
        {**_HEADS_OF_16, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 2}
        | {"attention_chunk_size": 8, "floor_scale": 8, "interleave_moe_layer_step": 2},
    ),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-40b": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw": (
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}
"""Model type and config of every family that is served, and of its variants that compute otherwise."""


def tiny_config(family: str, *, every_expert: bool = False) -> Any:
    """The config of one of `FAMILIES`.

    ``every_expert``: all experts compute every token, so that no rounding can change the choice.
    """
    model_type, arguments = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **arguments)
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if every_expert and getattr(config, key, None):
            config.num_experts_per_tok = getattr(config, key)
            config.topk_group = getattr(config, "n_group", None)
    return config


def save_random_model(config: Any, folder: Path) -> Any:
    """A model of that config with random weights in float32, which is also saved to the folder."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms and the like stay near what they are; the rest is large enough for every part to matter.
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.05)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model

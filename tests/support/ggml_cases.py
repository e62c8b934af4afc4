"""A small model of each architecture that llama.cpp is known to compute in parts."""

from __future__ import annotations

from typing import Any

import attrs
from random_gguf import ATTENTION, GATED, HEADS, INNER, LLAMA, WIDTH, Shapes

SIZE, KEYS, EXPERTS = WIDTH // HEADS, WIDTH // 2, 4
ATTENTION_ALONE = {name: shape for name, shape in ATTENTION.items() if name != "ffn_norm.weight"}
EQUAL_HEADS = {**ATTENTION, "attn_k.weight": (WIDTH, WIDTH), "attn_v.weight": (WIDTH, WIDTH)}
WITHOUT_NORMS = {name: shape for name, shape in ATTENTION.items() if not name.endswith("norm.weight")}
QKV_BIAS = {"attn_q.bias": (WIDTH,), "attn_k.bias": (KEYS,), "attn_v.bias": (KEYS,)}
HEAD_NORMS = {"attn_q_norm.weight": (SIZE,), "attn_k_norm.weight": (SIZE,)}
POST_NORMS = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
NORM_BIAS = {"attn_norm.bias": (WIDTH,), "ffn_norm.bias": (WIDTH,)}
UNGATED = {"ffn_up.weight": (INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER)}
UNGATED_BIAS = {"ffn_up.bias": (INNER,), "ffn_down.bias": (WIDTH,)}
FUSED = {
    "attn_norm.weight": (WIDTH,),
    "attn_qkv.weight": (WIDTH + 2 * KEYS, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_norm.weight": (WIDTH,),
}
FUSED_BIAS = NORM_BIAS | UNGATED_BIAS | {"attn_qkv.bias": (WIDTH + 2 * KEYS,), "attn_output.bias": (WIDTH,)}
MOE = {
    "ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "ffn_gate_exps.weight": (EXPERTS, INNER, WIDTH),
    "ffn_up_exps.weight": (EXPERTS, INNER, WIDTH),
    "ffn_down_exps.weight": (EXPERTS, WIDTH, INNER),
}
SHARED = {
    "ffn_gate_shexp.weight": (INNER, WIDTH),
    "ffn_up_shexp.weight": (INNER, WIDTH),
    "ffn_down_shexp.weight": (WIDTH, INNER),
}
HEAD = {"output.weight": (48, WIDTH)}
NORM = {"output_norm.bias": (WIDTH,)}
OF_EXPERTS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": INNER}
WINDOW = {"attention.sliding_window": 4}
LATENT = {
    "attn_norm.weight": (WIDTH,),
    "attn_q_a.weight": (32, WIDTH),
    "attn_q_a_norm.weight": (32,),
    "attn_q_b.weight": (HEADS * 24, 32),
    "attn_kv_a_mqa.weight": (32 + 8, WIDTH),
    "attn_kv_a_norm.weight": (32,),
    "attn_k_b.weight": (HEADS, 32, 16),
    "attn_v_b.weight": (HEADS, 16, 32),
    "attn_output.weight": (WIDTH, HEADS * 16),
    "ffn_norm.weight": (WIDTH,),
}


@attrs.frozen
class Case:
    """A small model of an architecture."""

    architecture: str
    each: Shapes | list[Shapes] = LLAMA
    keys: dict[str, Any] = attrs.field(factory=dict)
    around: Shapes = attrs.field(factory=dict)
    blocks: int = 5
    name: str = ""


def dense_then(dense: Shapes, sparse: Shapes, lead: int, blocks: int) -> list[Shapes]:
    return [dense] * lead + [sparse] * (blocks - lead)


CASES = [
    Case(
        "bloom",
        FUSED | FUSED_BIAS | UNGATED,
        {},
        {**NORM, "token_embd_norm.weight": (WIDTH,), "token_embd_norm.bias": (WIDTH,)},
    ),
    Case("arcee", ATTENTION | UNGATED),
    Case("cohere2", ATTENTION_ALONE | GATED, {**WINDOW, "logit_scale": 0.5}),
    Case("command-r", ATTENTION_ALONE | GATED, {"logit_scale": 0.5}),
    Case(
        "deepseek2",
        dense_then(LATENT | GATED, LATENT | MOE | SHARED, 2, 5),
        {
            **OF_EXPERTS,
            "leading_dense_block_count": 2,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "attention.q_lora_rank": 32,
            "attention.kv_lora_rank": 32,
            "attention.head_count_kv": 1,
            "attention.key_length": 40,
            "attention.value_length": 32,
            "attention.key_length_mla": 24,
            "attention.value_length_mla": 16,
            "rope.dimension_count": 8,
        },
    ),
    Case(
        "dots1",
        dense_then(EQUAL_HEADS | HEAD_NORMS | GATED, EQUAL_HEADS | HEAD_NORMS | MOE | SHARED, 2, 5),
        {
            **OF_EXPERTS,
            "attention.head_count_kv": HEADS,
            "leading_dense_block_count": 2,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
        },
        HEAD,
    ),
    Case("ernie4_5"),
    Case(
        "ernie4_5-moe",
        dense_then(LLAMA, ATTENTION | MOE, 1, 5),
        {**OF_EXPERTS, "interleave_moe_layer_step": 1, "leading_dense_block_count": 1},
    ),
    Case("exaone4", WITHOUT_NORMS | HEAD_NORMS | POST_NORMS | GATED),
    Case(
        "falcon",
        {
            "attn_norm.weight": (WIDTH,),
            "attn_norm.bias": (WIDTH,),
            "attn_qkv.weight": (WIDTH + 2 * SIZE, WIDTH),
            "attn_output.weight": (WIDTH, WIDTH),
            **UNGATED,
        },
        {"attention.head_count_kv": 1},
        NORM,
    ),
    Case("gemma", LLAMA),
    Case("gemma2", LLAMA | POST_NORMS, {**WINDOW, "attn_logit_softcapping": 50.0}),
    Case("gemma3", LLAMA | POST_NORMS | HEAD_NORMS, {**WINDOW, "rope.freq_base": 1e6}, blocks=8),
    Case(
        "gpt-oss",
        {
            **ATTENTION_ALONE,
            **QKV_BIAS,
            **MOE,
            "post_attention_norm.weight": (WIDTH,),
            "attn_sinks.weight": (HEADS,),
            "attn_output.bias": (WIDTH,),
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, INNER),
            "ffn_up_exps.bias": (EXPERTS, INNER),
            "ffn_down_exps.bias": (EXPERTS, WIDTH),
        },
        {**OF_EXPERTS, **WINDOW},
        HEAD,
    ),
    Case(
        "gpt2",
        {
            **FUSED,
            **FUSED_BIAS,
            **UNGATED,
            "attn_qkv.weight": (3 * WIDTH, WIDTH),
            "attn_qkv.bias": (3 * WIDTH,),
        },
        {"attention.head_count_kv": HEADS},
        {**NORM, "position_embd.weight": (128, WIDTH)},
    ),
    Case("gptneox", FUSED | FUSED_BIAS | UNGATED, {"use_parallel_residual": True}, HEAD | NORM),
    Case("granite", LLAMA, {"logit_scale": 2.0, "embedding_scale": 12.0, "residual_scale": 0.25}),
    Case(
        "granitemoe",
        ATTENTION | MOE,
        {**OF_EXPERTS, "logit_scale": 2.0, "embedding_scale": 12.0, "residual_scale": 0.25},
    ),
    Case("internlm2", LLAMA, {}, HEAD),
    Case("llama", LLAMA, {}, {"rope_freqs.weight": (SIZE // 2,)}),
    Case("llama", ATTENTION | MOE, {**OF_EXPERTS}, name="mixtral"),
    Case(
        "llama4",
        [ATTENTION | (MOE | SHARED if layer % 2 else GATED) for layer in range(8)],
        {
            **OF_EXPERTS,
            "interleave_moe_layer_step": 2,
            "expert_used_count": 1,
            "attention.sliding_window": 8192,
        },
        blocks=8,
    ),
    Case("minicpm"),
    Case("mistral3"),
    Case("nemotron", ATTENTION | NORM_BIAS | UNGATED, {}, HEAD | NORM),
    Case(
        "olmo2",
        {
            **WITHOUT_NORMS,
            **POST_NORMS,
            **GATED,
            "attn_q_norm.weight": (WIDTH,),
            "attn_k_norm.weight": (KEYS,),
        },
        WINDOW,
        HEAD,
    ),
    Case(
        "olmo2",
        {
            **WITHOUT_NORMS,
            **POST_NORMS,
            **GATED,
            "attn_q_norm.weight": (WIDTH,),
            "attn_k_norm.weight": (KEYS,),
        },
        {},
        HEAD,
        name="olmo2 without windows",
    ),
    Case(
        "olmoe",
        {
            **EQUAL_HEADS,
            **MOE,
            "attn_q_norm.weight": (WIDTH,),
            "attn_k_norm.weight": (WIDTH,),
        },
        {**OF_EXPERTS, "attention.head_count_kv": HEADS},
        HEAD,
    ),
    Case(
        "phi2",
        {**ATTENTION_ALONE, **QKV_BIAS, **UNGATED, **UNGATED_BIAS}
        | {"attn_norm.bias": (WIDTH,), "attn_output.bias": (WIDTH,)},
        {},
        {**HEAD, **NORM, "output.bias": (48,)},
    ),
    Case(
        "phi3",
        {**FUSED, "ffn_up.weight": (2 * INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER)},
        {"rope.scaling.original_context_length": 4096},
        {"rope_factors_long.weight": (SIZE // 2,), "rope_factors_short.weight": (SIZE // 2,)},
    ),
    Case("qwen2", LLAMA | QKV_BIAS),
    Case(
        "qwen2moe",
        {**ATTENTION, **QKV_BIAS, **MOE, **SHARED, "ffn_gate_inp_shexp.weight": (WIDTH,)},
        {**OF_EXPERTS, "expert_shared_feed_forward_length": INNER},
        HEAD,
    ),
    Case("qwen3", LLAMA | HEAD_NORMS),
    Case("qwen3moe", ATTENTION | HEAD_NORMS | MOE, OF_EXPERTS),
    Case("seed_oss", ATTENTION_ALONE | QKV_BIAS | {"post_attention_norm.weight": (WIDTH,)} | GATED),
    Case("smollm3", blocks=8),
    Case("stablelm", LLAMA | NORM_BIAS, {"rope.dimension_count": 8}, HEAD | NORM),
    Case(
        "starcoder2",
        {**ATTENTION, **QKV_BIAS, **NORM_BIAS, **UNGATED, **UNGATED_BIAS, "attn_output.bias": (WIDTH,)},
        {},
        NORM,
    ),
    Case(
        "llama",
        LLAMA,
        {"attention.head_count_kv": [2] * 5, "feed_forward_length": [INNER] * 5},
        name="values for each layer",
    ),
]

"""Every family, cut into spans and run in ragged batches, against the whole model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarmcore.errors import SwarmError
from swarmcore.executor.base import Segment, SequenceId, Slice
from swarmcore.executor.torch import batch
from swarmcore.executor.torch.checkpoint import open_checkpoint
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.tensors import to_torch, to_wire
from swarmcore.types import Span

VOCABULARY = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_HEADS_OF_16 = {**_SIZES, "head_dim": 16}
_SLIDING = {**_HEADS_OF_16, "sliding_window": 8}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}


def _rope(kind: str, factor: float, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, "factor": factor, **parameters}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama-linear": ("llama", {**_SIZES, "rope_parameters": _rope("linear", 2.0)}),
    "llama-dynamic": ("llama", {**_SIZES, "rope_parameters": _rope("dynamic", 2.0)}),
    "llama-llama3": ("llama", {**_SIZES, "rope_parameters": _rope("llama3", 8.0, **_LLAMA3)}),
    "llama-yarn": (
        "llama",
        {**_SIZES, "rope_parameters": _rope("yarn", 4.0, original_max_position_embeddings=64)},
    ),
    "mistral": ("mistral", _SLIDING),
    "qwen2": ("qwen2", _SIZES),
    "qwen2-sliding": (
        "qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", _HEADS_OF_16),
    "gemma2": ("gemma2", _SLIDING),
    "gemma3": ("gemma3_text", {**_SLIDING, "num_hidden_layers": 7}),
    "mixtral": ("mixtral", {**_SIZES, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_HEADS_OF_16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "gpt_oss": ("gpt_oss", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {**_SIZES, "sliding_window": 8}),
    "phi3-longrope": (
        "phi3",
        {
            **_SIZES,
            "original_max_position_embeddings": 64,
            "rope_parameters": _rope("longrope", 4.0, **_LONG),
        },
    ),
    "olmo2": ("olmo2", _SIZES),
    "granite": ("granite", {**_SIZES, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2}
        | {"topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 2}
        | {"kv_lora_rank": 16, "q_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    ),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 256}),
    "gpt2-by-index": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 256}
        | {"scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 5, "n_head": 4}),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-40b": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-rw": (
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}


def config_of(family: str, *, every_expert: bool = False) -> Any:
    """``every_expert``: all experts compute every token, so that no rounding can change the choice."""
    model_type, arguments = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **arguments)
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if every_expert and getattr(config, key, None):
            config.num_experts_per_tok = getattr(config, key)
            config.topk_group = getattr(config, "n_group", None)
    return config


SPANS = (Span(0, 2), Span(2, 3), Span(3, 5))
LENGTHS = (24, 13, 10)

STEPS: Sequence[Sequence[tuple[int, int, int]]] = [
    [(0, 0, 7), (1, 0, 10)],
    [(2, 0, 3), (0, 7, 8), (1, 10, 11)],
    [(0, 8, 15), (2, 3, 4), (1, 11, 12)],
    [(0, 15, 16)],
    [(2, 4, 8)],
    [(0, 12, 14), (1, 5, 9), (2, 2, 3)],
    [(0, 14, 15), (1, 9, 10), (2, 3, 4)],
    [(0, 15, 23), (1, 10, 12), (2, 4, 9)],
    [(0, 23, 24), (1, 12, 13), (2, 9, 10)],
]
"""Batches of (sequence, from, to). The sixth rolls all sequences back, over tokens that were not theirs."""

ROLLBACK = 5


def whole_model(config: Any, folder: Path) -> Any:
    """A model with random weights, saved."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms and the like stay near what they are; the rest is large enough for every part to matter.
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.05)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def block_states(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's hidden states before the first and after the last block, ``[tokens, hidden size]``."""
    base = model.base_model
    blocks = next(child for child in base.children() if isinstance(child, torch.nn.ModuleList))
    seen: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    with torch.inference_mode():
        model(tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen[0][0], seen[1][0]


async def run_chain(
    chain: Sequence[TorchExecutor], parts: Sequence[tuple[Segment, torch.Tensor]]
) -> list[torch.Tensor]:
    """One batch through all executors: a slice for each segment."""
    hidden: list[Any] = [to_wire("hidden", rows.clone()) for _, rows in parts]
    for executor in chain:
        slices = [
            Slice(tensor, 0, executor.span, (segment,))
            for tensor, (segment, _) in zip(hidden, parts, strict=True)
        ]
        hidden = await executor.step(slices)
        assert not [each for each in hidden if isinstance(each, SwarmError)]
    return [to_torch(tensor) for tensor in hidden]


@pytest.mark.parametrize("family", FAMILIES)
async def test_spans_in_ragged_batches_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    assert await largest_error(family, tmp_path) < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
async def test_scores_computed_in_blocks(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_EXPLICIT_SCORES", 64)
    assert await largest_error(family, tmp_path) < 1e-4


async def test_many_rows_are_not_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_PACKED_ROWS", 1)
    assert await largest_error("mistral", tmp_path) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
async def test_float16_is_close(family: str, tmp_path: Path) -> None:
    assert await largest_error(family, tmp_path, "float16") < 0.05


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", "bloom", "falcon-rw", "gpt2", "deepseek_v3"]
)
async def test_bfloat16_is_close(family: str, tmp_path: Path) -> None:
    assert await largest_error(family, tmp_path, "bfloat16") < 0.4


async def largest_error(family: str, folder: Path, dtype: str = "float32") -> float:
    """Run `STEPS` through a chain of `SPANS`; the largest difference to the whole model in float32."""
    model = whole_model(config_of(family, every_expert=dtype != "float32"), folder)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    states = [block_states(model, tokens) for tokens in sequences]
    others = [block_states(model, tokens.flip(0))[0] for tokens in sequences]
    checkpoint = open_checkpoint(str(folder))
    blocks = checkpoint.info.blocks
    chain = [
        TorchExecutor.load(
            checkpoint, Span(span.start, blocks if span is SPANS[-1] else span.end), dtype=dtype
        )
        for span in SPANS
    ]
    worst = 0.0
    for number, step in enumerate(STEPS):
        parts = []
        for sequence, start, end in step:
            rolled_back = STEPS[ROLLBACK][[s for s, _, _ in STEPS[ROLLBACK]].index(sequence)][1]
            source = others if number < ROLLBACK and start >= rolled_back else [into for into, _ in states]
            for executor in chain:
                executor.reserve(SequenceId(sequence), end)
            parts.append((Segment(SequenceId(sequence), start, end - start), source[sequence][start:end]))
        outputs = await run_chain(chain, parts)
        for (sequence, start, end), output in zip(step, outputs, strict=True):
            if number >= ROLLBACK or end <= STEPS[ROLLBACK][sequence][1]:
                worst = max(worst, (output - states[sequence][1][start:end]).abs().max().item())
    for executor in chain:
        await executor.close()
    return worst

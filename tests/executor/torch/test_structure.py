"""Where families have their blocks and what comes after them, told by running them; blocks by their index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_random_model
from transformers import AutoConfig

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.structure import Structure, structure_of
from swarmcore.types import Span

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
ERNIE = {"moe_layer_start_index": 1, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16}
AFMOE = {"num_dense_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}

FOUND: dict[str, tuple[str, dict[str, Any], Structure]] = {
    "llama": ("llama", {}, Structure("model", "layers", ("norm",))),
    "a norm without parameters": ("olmo", {}, Structure("model", "layers", ("norm",))),
    "a norm at both ends": ("nanochat", {}, Structure("model", "layers", ("norm",), ("norm",))),
    "a base within another": ("opt", OPT, Structure("model.decoder", "layers", ("final_layer_norm",))),
    "a projection": (
        "opt",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        Structure("model.decoder", "layers", ("project_out",)),
    ),
    "another name": (
        "lfm2",
        {"layer_types": ["full_attention"] * 3},
        Structure("model", "layers", ("embedding_norm",)),
    ),
    "blocks that give tuples": ("bloom", {}, Structure("transformer", "h", ("ln_f",))),
    "nothing": ("openai-gpt", {}, Structure("transformer", "h", ())),
}


def config(model_type: str, settings: dict[str, Any]) -> Any:
    known = AutoConfig.for_model(model_type)
    names = vars(known).keys() | known.attribute_map.keys()
    return AutoConfig.for_model(model_type, **{k: v for k, v in SIZES.items() if k in names} | settings)


@pytest.mark.parametrize("case", FOUND)
def test_what_comes_after_the_blocks(case: str) -> None:
    model_type, settings, structure = FOUND[case]
    assert structure_of(config(model_type, settings)) == structure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["gpt2", "phimoe", "bloom", "opt"])
def test_whatever_dtype_the_weights_are_in(model_type: str, dtype: torch.dtype) -> None:
    """A LayerNorm in half precision takes no float32."""
    half = config(model_type, OPT if model_type == "opt" else {})
    expected = structure_of(half)
    half.dtype = dtype
    assert structure_of(half) == expected


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("olmo", {}),
        ("nanochat", {}),
        ("opt", OPT),
        ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("ernie4_5_moe", ERNIE),
        ("afmoe", AFMOE),
        ("gpt_neox_japanese", {}),
    ],
)
def test_the_client_s_part_and_blocks_in_the_middle_load(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whether they compute what the whole model does is tested as they are loaded."""
    torch.manual_seed(0)
    save_random_model(config(model_type, settings), tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert TorchExecutor.load(checkpoint, Span(1, 2)).span == Span(1, 2)
    TorchExecutor.load(checkpoint, Span(2, 3))
    parts = LocalParts.load(checkpoint)
    once = parts.embed([3, 4], [0, 1])
    assert torch.equal(once, parts.embed([3, 4], [0, 1]))

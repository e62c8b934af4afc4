"""A GGUF of every architecture gives the model it was made from; what would be lost is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.gguf_checkpoint import GgufCheckpoint
from swarmcore.checkpoint.gguf_config import Metadata
from swarmcore.checkpoint.gguf_model import open_local
from swarmcore.checkpoint.gguf_tokenizer import check_tokenizer
from swarmcore.errors import CheckpointError, UnsupportedModelError

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {**SIZES, "head_dim": 32}
OLD = {"vocab_size": 259, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
RMS = {"attention.layer_norm_rms_epsilon": 1e-3}
NORM = {"attention.layer_norm_epsilon": 1e-3}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
FACTORS = [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0]


def rope(kind: str = "default", theta: float = 10_000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


YARN_ROPE = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONG_FACTORS = {"short_factor": FACTORS, "long_factor": [2 * factor for factor in FACTORS]}
LONG_ROPE = rope("longrope", factor=4.0, original_max_position_embeddings=16, **LONG_FACTORS)
LONG_KEYS = {
    "rope.scaling.original_context_length": 16,
    "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
}
GEMMA_WINDOW = {
    **HEADS,
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "rms_norm_eps": 1e-3,
    "query_pre_attn_scalar": 32,
}
GEMMA_KEYS = {**RMS, "attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 8}
GEMMA3 = {**GEMMA_WINDOW, "num_hidden_layers": 7}
GEMMA3_ROPE = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {**SIZES, "rms_norm_eps": 1e-3}, RMS, {}),
    "llama, wide heads": ("llama", "llama", HEADS, {"attention.key_length": 32}, {}),
    "llama, base": ("llama", "llama", SIZES | rope(theta=5e5), {"rope.freq_base": 5e5}, {}),
    "llama, tied": ("llama", "llama", {**SIZES, "tie_word_embeddings": True}, {}, {}),
    "llama, linear": ("llama", "llama", SIZES | rope("linear", factor=4.0), LINEAR, {}),
    "llama, old linear": (
        "llama",
        "llama",
        SIZES | rope("linear", factor=4.0),
        {"rope.scale_linear": 4.0},
        {},
    ),
    "llama, yarn": ("llama", "llama", SIZES | YARN_ROPE, YARN, {}),
    "llama, frequencies": (
        "llama",
        "llama",
        SIZES
        | rope(
            "longrope",
            factor=1.0,
            attention_factor=1.0,
            original_max_position_embeddings=64,
            short_factor=FACTORS,
            long_factor=FACTORS,
        ),
        {},
        {"rope_freqs.weight": FACTORS},
    ),
    "called mistral": ("llama", "llama", SIZES, {"general.name": "mistral"}, {}),
    "qwen2": ("qwen2", "qwen2", {**SIZES, "rms_norm_eps": 1e-3} | YARN_ROPE, RMS | YARN, {}),
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        {**SIZES, **MOE, "shared_expert_intermediate_size": 48},
        {**EXPERTS, "expert_shared_feed_forward_length": 48},
        {},
    ),
    "qwen3": ("qwen3", "qwen3", HEADS, {"attention.key_length": 32}, {}),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {**HEADS, **MOE, "norm_topk_prob": True},
        {**EXPERTS, "attention.key_length": 32},
        {},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {**GEMMA_WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
        {**GEMMA_KEYS, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": GEMMA3_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        GEMMA_KEYS | LINEAR | {"rope.scaling.factor": 8.0, "rope.freq_base": 1e6},
        {},
    ),
    "phi3": ("phi3", "phi3", {**SIZES, "sliding_window": 8}, {"attention.sliding_window": 8}, {}),
    "phi3, partial": (
        "phi3",
        "phi3",
        SIZES | rope(partial_rotary_factor=0.5),
        {"rope.dimension_count": 8},
        {},
    ),
    "phi3, long": (
        "phi3",
        "phi3",
        {**SIZES, "original_max_position_embeddings": 16} | LONG_ROPE,
        LONG_KEYS,
        {
            "rope_factors_short.weight": FACTORS,
            "rope_factors_long.weight": LONG_FACTORS["long_factor"],
        },
    ),
    "starcoder2": (
        "starcoder2",
        "starcoder2",
        {**SIZES, "norm_epsilon": 1e-3} | rope(theta=1e5),
        {**NORM, "rope.freq_base": 1e5},
        {},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        {**SIZES, "layer_norm_eps": 1e-3, "use_qkv_bias": True} | rope(theta=1e5, partial_rotary_factor=0.5),
        {**NORM, "rope.dimension_count": 8, "rope.freq_base": 1e5, "use_parallel_residual": True},
        {},
    ),
    "nemotron": (
        "nemotron",
        "nemotron",
        {**SIZES, "norm_eps": 1e-3} | rope(theta=1e5, partial_rotary_factor=0.5),
        {**NORM, "rope.dimension_count": 8, "rope.freq_base": 1e5},
        {},
    ),
    "gpt2": (
        "gpt2",
        "gpt2",
        {**OLD, "n_embd": 64, "n_positions": 64, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
        NORM,
        {},
    ),
    "bloom": ("bloom", "bloom", {**OLD, "layer_norm_epsilon": 1e-3}, NORM, {}),
    "falcon": (
        "falcon",
        "falcon",
        {
            "vocab_size": 259,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "layer_norm_epsilon": 1e-3,
        },
        {**NORM, "attention.head_count_kv": 1},
        {},
    ),
}


def random_model(model_type: str, arguments: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(model_type, **arguments)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.05)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_model_is_the_one_that_was_written(case: str, tmp_path: Path) -> None:
    architecture, model_type, arguments, keys, tensors = CASES[case]
    model = random_model(model_type, arguments)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, keys=keys, tensors=tensors)
    folder = open_checkpoint(str(path), cache_dir=tmp_path / "cache").folder
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1, 259, (1, 40), generator=torch.Generator().manual_seed(2))
    for parameter in model.parameters():  # the conversion's precision
        parameter.copy_(parameter.bfloat16().float())
    expected, found = model(ids).logits, converted(ids).logits
    # Norms that are kept as their weight plus one, and rounded there, are less precise.
    assert (found - expected).abs().max() < 0.03 * expected.std()
    assert_read_by_blocks(path, converted, tmp_path / "cache")


def assert_read_by_blocks(path: Path, converted: Any, cache: Path) -> None:
    """Dequantised block by block, the tensors are those of the whole conversion, under the model's names."""
    checkpoint = GgufCheckpoint(open_local(path), cache)
    state = converted.state_dict()
    tied = {"lm_head.weight"} if converted.config.tie_word_embeddings else set()
    assert set(checkpoint.names()) == state.keys() - tied
    for name, data in checkpoint.read(checkpoint.names()).items():
        assert torch.equal(data.float(), state[name]), name
    own, other = (config.to_dict() for config in (checkpoint.config, converted.config))
    for key in ("_name_or_path", "dtype"):
        del own[key], other[key]
    assert own == other


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_count": 8, "expert_used_count": 2}, r"llama\.expert_count = 8"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale"),
        ({"residual_scale": 0.5}, r"llama\.residual_scale"),
        ({"embedding_scale": 2.0}, r"llama\.embedding_scale"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale"),
        ({"attention.sliding_window": 8}, r"llama\.attention\.sliding_window = 8"),
        ({"attention.causal": False}, r"attention\.causal"),
        ({"attention.head_count_kv": [2, 1]}, "value for each block"),
        ({"attention.value_length": 8}, r"attention\.value_length"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count = 8"),
        ({"rope.scaling.type": "longrope"}, "'longrope'"),
        ({"rope.scaling.attn_factor": 1.2}, "attn_factor"),
        ({**YARN, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"something.new": "yes"}, r"llama\.something\.new = 'yes'"),
        ({"general.type": "adapter"}, "no model, but what its metadata calls 'adapter'"),
    ],
)
def test_keys_that_would_be_lost_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama", SIZES), "llama", keys=keys)
    with pytest.raises(UnsupportedModelError, match=words):
        open_checkpoint(str(path), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "tensor",
    ["blk.0.attn_q.bias", "blk.1.attn_sinks", "output_norm.bias", "cls.weight", "rope_factors_long.weight"],
)
def test_tensors_that_would_be_lost_are_refused(tensor: str, tmp_path: Path) -> None:
    model = random_model("llama", SIZES)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", keys={}, tensors={tensor: [1.0] * 8})
    with pytest.raises(UnsupportedModelError, match=f"the tensor {tensor}"):
        open_checkpoint(str(path), cache_dir=tmp_path / "cache")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama", SIZES), "xverse", keys={})
    with pytest.raises(UnsupportedModelError, match=r"architecture 'xverse'.*Converted are bloom, .*llama"):
        open_checkpoint(str(path), cache_dir=tmp_path / "cache")


def test_falcon_with_several_key_heads_is_refused(tmp_path: Path) -> None:
    model = random_model(CASES["falcon"][1], CASES["falcon"][2])
    path = write_gguf(tmp_path / "model.gguf", model, "falcon", keys={"attention.head_count_kv": 2})
    with pytest.raises(UnsupportedModelError, match="head_count_kv other than 1"):
        open_checkpoint(str(path), cache_dir=tmp_path / "cache")


def test_tensors_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    model = random_model("llama", {**SIZES, "num_hidden_layers": 1})
    path = write_gguf(tmp_path / "model.gguf", model, "llama", keys={"block_count": 2})
    with pytest.raises(CheckpointError, match="no tensors of block 1"):
        open_checkpoint(str(path), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("keys", "ends"), [({}, 0), ({"tokenizer.ggml.eot_token_id": 2}, [0, 2])])
def test_the_tokens_that_end_a_text(keys: dict[str, Any], ends: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama", SIZES), "llama", keys=keys)
    folder = open_checkpoint(str(path), cache_dir=tmp_path / "cache").folder
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert AutoConfig.from_pretrained(folder).eos_token_id == 0


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("default", "a\n\n57", ["a", "Ċ", "Ċ", "57"]),
        ("gpt-2", "a\n\n57", ["a", "Ċ", "Ċ", "57"]),
        ("smollm", "a\n\n57", ["a", "ĊĊ", "5", "7"]),
        ("starcoder", "a  7", ["a", "ĠĠ", "7"]),
        ("llama-bpe", "a\n\n5789", ["a", "ĊĊ", "578", "9"]),
        ("qwen2", "a\n\n57", ["a", "ĊĊ", "5", "7"]),
        ("stablelm2", "a\n\n57", ["a", "ĊĊ", "5", "7"]),
        ("falcon", "a--b 12345", ["a", "--", "b", "Ġ", "123", "45"]),
        ("bloom", "a, 5 b", ["a", ",", "Ġ5", "Ġb"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, text: str, parts: list[str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama", SIZES), "llama", keys={}, pre=pre)
    folder = open_checkpoint(str(path), cache_dir=tmp_path / "cache").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [part for part, _ in split] == parts
    begins = tokenizer("he")["input_ids"][0] == tokenizer.bos_token_id
    assert begins == tokenizer.backend_tokenizer.model.ignore_merges == (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "'deepseek-llm'"),
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv'"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}, "add_space_prefix"),
    ],
)
def test_tokenizers_that_would_be_others_are_refused(keys: dict[str, Any], words: str) -> None:
    tokenizer = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    metadata = Metadata(
        "model.gguf", "llama", {}, frozenset(), {}, "model", frozenset(), {}, {"model": "gpt2"} | tokenizer
    )
    with pytest.raises(UnsupportedModelError, match=words):
        check_tokenizer(metadata)

"""What the metadata of a GGUF says of its model, put into transformers' config, or refused.

Transformers reads some of the keys and leaves the others to the defaults of the config's class, which are one
checkpoint's values. So the config is completed here, architecture by architecture. Whatever else a file says
of its model, in a key or as a tensor, would be lost in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from swarmcore.errors import CheckpointError, UnsupportedModelError

_ATTENTION = "attn_norm.weight attn_q.weight attn_k.weight attn_v.weight attn_output.weight ffn_norm.weight "
_GATED = "ffn_gate.weight ffn_up.weight ffn_down.weight "
_EXPERTS = "ffn_gate_inp.weight ffn_gate_exps.weight ffn_up_exps.weight ffn_down_exps.weight "
_SHARED = "ffn_gate_inp_shexp.weight ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight "
_QKV_BIAS = "attn_q.bias attn_k.bias attn_v.bias "
_HEAD_NORMS = "attn_q_norm.weight attn_k_norm.weight "
_POST_NORMS = "post_attention_norm.weight post_ffw_norm.weight "
_NORM_BIAS = "attn_norm.bias ffn_norm.bias "
_FUSED = "attn_norm.weight attn_qkv.weight attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight "
_ALL_BIAS = _NORM_BIAS + "attn_qkv.bias attn_output.bias ffn_up.bias ffn_down.bias "

_BLOCK_TENSORS = {
    "llama": _ATTENTION + _GATED,
    "qwen2": _ATTENTION + _GATED + _QKV_BIAS,
    "qwen2moe": _ATTENTION + _QKV_BIAS + _EXPERTS + _SHARED,
    "qwen3": _ATTENTION + _GATED + _HEAD_NORMS,
    "qwen3moe": _ATTENTION + _HEAD_NORMS + _EXPERTS,
    "gemma2": _ATTENTION + _GATED + _POST_NORMS,
    "gemma3": _ATTENTION + _GATED + _POST_NORMS + _HEAD_NORMS,
    "phi3": _FUSED,
    "starcoder2": _ATTENTION + _QKV_BIAS + _ALL_BIAS + "ffn_up.weight ffn_down.weight",
    "stablelm": _ATTENTION + _GATED + _QKV_BIAS + _NORM_BIAS,
    "nemotron": _ATTENTION + _NORM_BIAS + "ffn_up.weight ffn_down.weight",
    "gpt2": _FUSED + _ALL_BIAS,
    "bloom": _FUSED + _ALL_BIAS,
    "falcon": _FUSED + "attn_norm.bias",
}
"""By architecture, the tensors of a block that transformers' conversion knows of."""

_OTHER_TENSORS = frozenset({"token_embd.weight", "output.weight", "output_norm.weight"})
_OWN_TENSORS = {
    "gpt2": frozenset({"position_embd.weight"}),
    "bloom": frozenset({"token_embd_norm.weight", "token_embd_norm.bias"}),
}
_TOKENS = "tokenizer.ggml."
_ROPE_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"

_COMMON_KEYS = frozenset(
    {
        "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size",
        "tensor_data_layout", "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
        "attention.causal", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
        "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip
_EXPERT_KEYS = frozenset(
    ["expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"]
)
_OWN_KEYS = {
    "qwen2moe": _EXPERT_KEYS,
    "qwen3moe": _EXPERT_KEYS,
    "gemma2": frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    "gemma3": frozenset({"final_logit_softcapping", "rope.freq_base_swa"}),
    "stablelm": frozenset({"use_parallel_residual"}),
}
_OF_THE_FILE = re.compile(r"(general|tokenizer|GGUF|quantize|imatrix|split)\..*")
_PARTIAL_ROTARY = frozenset({"phi3", "stablelm", "nemotron"})
_SCALED = frozenset({"llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma3"})
"""Architectures whose rope is scaled as the keys ``rope.scaling`` say."""
_WINDOWED = frozenset({"gemma2", "gemma3", "phi3"})
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


@attrs.frozen
class Metadata:
    """What a GGUF file says, without the values of its weights."""

    name: str
    architecture: str
    values: Mapping[str, Any]
    """Of the keys that begin with the architecture, without it."""
    other_keys: frozenset[str]
    tokens: Mapping[str, int]
    """Numbers of the special tokens, by the keys that begin with ``tokenizer.ggml``, without that."""
    kind: str
    """``model``, ``adapter``, …; of ``general.type``."""
    tensors: frozenset[str]
    factors: Mapping[str, tuple[float, ...]]
    """What is in the tensors that scale rotary frequencies."""
    tokenizer: Mapping[str, Any] = attrs.field(factory=dict)
    """Short values of the keys that begin with ``tokenizer.ggml``, without that."""

    @classmethod
    def read(cls, source: Path) -> Metadata:
        """Read the header of a file. Raises whatever the reader does for damaged files."""
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(source)
        fields = {key: field.contents() for key, field in reader.fields.items() if _is_small(field)}
        architecture = str(fields.get("general.architecture", ""))
        prefix = f"{architecture}."
        return cls(
            name=source.name,
            architecture=architecture,
            values={
                key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)
            },
            other_keys=frozenset(key for key in reader.fields if not key.startswith(prefix)),
            tokens={
                key.removeprefix(_TOKENS): int(value)
                for key, value in fields.items()
                if key.startswith(_TOKENS) and key.endswith("_token_id")
            },
            kind=str(fields.get("general.type", "model")),
            tensors=frozenset(tensor.name for tensor in reader.tensors),
            factors={
                tensor.name: tuple(float(value) for value in dequantize(tensor.data, tensor.tensor_type))
                for tensor in reader.tensors
                if tensor.name in (_ROPE_FREQUENCIES, _LONG, _SHORT)
            },
            tokenizer={
                key.removeprefix(_TOKENS): value for key, value in fields.items() if key.startswith(_TOKENS)
            },
        )


def check_metadata(metadata: Metadata) -> None:
    """Raise `UnsupportedModelError` for keys and tensors that would be lost, and for other architectures."""
    name, architecture = metadata.name, metadata.architecture
    if metadata.kind != "model" or any(key.startswith("adapter.") for key in metadata.other_keys):
        raise UnsupportedModelError(f"{name} holds no model, but what its metadata calls {metadata.kind!r}")
    if architecture not in _BLOCK_TENSORS:
        raise UnsupportedModelError(
            f"{name} is of the architecture {architecture!r}, of which a GGUF is not converted; use its "
            f"safetensors checkpoint. Converted are {', '.join(sorted(_BLOCK_TENSORS))}"
        )
    known = _COMMON_KEYS | _OWN_KEYS.get(architecture, frozenset())
    for key, value in sorted(metadata.values.items()):
        if key not in known and value not in (None, False, 0, "", "none"):
            raise _unknown(metadata, f"{architecture}.{key} = {value!r}")
        if isinstance(value, list):
            raise _unknown(metadata, f"{architecture}.{key}, which has a value for each block")
    for key in sorted(metadata.other_keys):
        if re.fullmatch(rf"{re.escape(architecture)}\w*\..*", key) and not _OF_THE_FILE.fullmatch(key):
            raise _unknown(metadata, key)
    block = frozenset(_BLOCK_TENSORS[architecture].split())
    others = _OTHER_TENSORS | _OWN_TENSORS.get(architecture, frozenset())
    if "attn_norm.bias" in block:
        others |= {"output_norm.bias"}
    for tensor in sorted(metadata.tensors):
        match = re.fullmatch(r"blk\.\d+\.(.+)", tensor)
        rope = tensor in metadata.factors and (tensor == _ROPE_FREQUENCIES) == (architecture != "phi3")
        if not (match[1] in block if match else tensor in others or rope):
            raise _unknown(metadata, f"the tensor {tensor}")


def complete_config(config: Any, metadata: Metadata) -> None:
    """Put into ``config``, which transformers made of the file, what it left out.

    What is not in the file is as llama.cpp has it then, not as the config's class does.

    Raise `UnsupportedModelError` for values that the family's classes have no way to honour.
    """
    values, architecture = metadata.values, metadata.architecture
    if values.get("attention.causal") is False:
        raise _unknown(metadata, f"{architecture}.attention.causal = False")
    heads = int(_needed(metadata, "attention.head_count"))
    width = int(_needed(metadata, "embedding_length"))
    size = int(values.get("attention.key_length") or width // heads)
    if int(values.get("attention.value_length") or size) != size:
        raise _unknown(metadata, f"{architecture}.attention.value_length, which is not that of keys")
    if "head_dim" in vars(config) or size * heads != width:
        config.head_dim = size
    if architecture == "falcon":
        if int(values.get("attention.head_count_kv", heads)) != 1:
            raise _unknown(metadata, "falcon.attention.head_count_kv other than 1")
    elif architecture not in ("gpt2", "bloom"):
        config.num_key_value_heads = int(values.get("attention.head_count_kv") or heads)
    epsilon = values.get("attention.layer_norm_rms_epsilon") or values.get("attention.layer_norm_epsilon")
    for attribute in _EPSILONS:
        if epsilon is not None and attribute in vars(config):
            setattr(config, attribute, float(epsilon))
    for own, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(config, f"{own}_token_id", metadata.tokens.get(f"{key}_token_id"))
    if architecture == "gpt2":
        config.n_positions = int(_needed(metadata, "context_length"))
        config.n_inner = int(values.get("feed_forward_length") or 4 * width)
    if architecture in _OWN_KEYS and "expert_count" in _OWN_KEYS[architecture]:
        config.moe_intermediate_size = int(_needed(metadata, "expert_feed_forward_length"))
        if shared := values.get("expert_shared_feed_forward_length"):
            config.shared_expert_intermediate_size = int(shared)
    if architecture.startswith("gemma"):
        _complete_gemma(config, metadata, width // heads, size)
    _set_window(config, metadata)
    if architecture not in ("gpt2", "bloom"):
        _set_rope(config, metadata, size)


def ends(metadata: Metadata) -> list[int]:
    """The tokens at which a text ends: of a text, of a turn, of a message."""
    found = (metadata.tokens.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(token for token in found if token is not None))


def _complete_gemma(config: Any, metadata: Metadata, share: int, size: int) -> None:
    # As llama.cpp tells them apart: in the largest of each kind queries are scaled by another size.
    largest = {"gemma2": 46, "gemma3": 62}[metadata.architecture]
    config.query_pre_attn_scalar = share if config.num_hidden_layers == largest else size
    final = metadata.values.get("final_logit_softcapping")
    if metadata.architecture == "gemma3":
        config.final_logit_softcapping = final or None
    else:
        config.final_logit_softcapping = final or 30.0
        config.attn_logit_softcapping = metadata.values.get("attn_logit_softcapping") or 50.0


def _set_window(config: Any, metadata: Metadata) -> None:
    window = metadata.values.get("attention.sliding_window") or None
    if metadata.architecture in _WINDOWED:
        if window is not None:
            config.sliding_window = int(window)
    elif window is not None and int(window) < int(_needed(metadata, "context_length")):
        raise _unknown(metadata, f"{metadata.architecture}.attention.sliding_window = {window}")
    elif getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # the default of a class, of which the file says nothing


def _set_rope(config: Any, metadata: Metadata, size: int) -> None:
    values, architecture = metadata.values, metadata.architecture
    rotated = int(values.get("rope.dimension_count") or size)
    if rotated != size and architecture not in _PARTIAL_ROTARY:
        raise _unknown(metadata, f"{architecture}.rope.dimension_count = {rotated}, of heads of {size}")
    theta = float(values.get("rope.freq_base") or 10_000.0)
    rope = {"rope_theta": theta, **_scaling(metadata)}
    if architecture in _PARTIAL_ROTARY:
        rope["partial_rotary_factor"] = rotated / size
    if rope["rope_type"] != "default" and architecture not in _SCALED:
        raise _unknown(metadata, f"{architecture}.rope.scaling.type = {rope['rope_type']!r}")
    if architecture == "gemma3":
        if rope["rope_type"] not in ("default", "linear"):
            raise _unknown(metadata, f"gemma3.rope.scaling.type = {rope['rope_type']!r}")
        local = float(values.get("rope.freq_base_swa") or 10_000.0)
        config.rope_parameters = {
            "full_attention": rope,
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }
    else:
        config.rope_parameters = rope
        if architecture == "phi3":  # which has it in two places
            original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
            config.original_max_position_embeddings = original


def _scaling(metadata: Metadata) -> dict[str, Any]:
    """The scaling of rotary frequencies, as the rope parameters of transformers have it."""
    values, architecture = metadata.values, metadata.architecture
    # llama.cpp takes a file that names no kind, but a factor, for linear.
    kind = str(values.get("rope.scaling.type") or "linear")
    factor = float(values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1.0)
    original = int(values.get("rope.scaling.original_context_length") or _needed(metadata, "context_length"))
    attention = float(
        values.get("rope.scaling.attn_factor") or values.get("rope.scaling.yarn_attn_factor") or 1.0
    )
    if architecture == "phi3":
        return _long_rope(metadata, kind, factor, original, attention)
    if kind in ("none", "linear") and attention != 1.0:
        raise _unknown(metadata, f"{architecture}.rope.scaling.attn_factor = {attention}")
    frequencies = metadata.factors.get(_ROPE_FREQUENCIES, ())
    if any(value != 1.0 for value in frequencies):
        if kind not in ("none", "linear"):
            raise _unknown(metadata, f"{_ROPE_FREQUENCIES} beside rope scaling of the kind {kind}")
        by = [value * (factor if kind == "linear" else 1.0) for value in frequencies]
        # Of all kinds the one that takes a factor for each frequency.
        return {
            "rope_type": "longrope",
            "short_factor": by,
            "long_factor": by,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original,
        }
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise _unknown(metadata, f"{architecture}.rope.scaling.type = {kind!r}")
    if float(values.get("rope.scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0):
        raise _unknown(metadata, f"{architecture}.rope.scaling.yarn_ext_factor")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * (1.0 + 0.1 * math.log(factor)),
        "beta_fast": float(values.get("rope.scaling.yarn_beta_fast") or 32.0),
        "beta_slow": float(values.get("rope.scaling.yarn_beta_slow") or 1.0),
    }


def _long_rope(
    metadata: Metadata, kind: str, factor: float, original: int, attention: float
) -> dict[str, Any]:
    long, short = metadata.factors.get(_LONG), metadata.factors.get(_SHORT)
    if long is None or short is None:
        if kind in ("none", "linear") and factor == 1.0 and attention == 1.0:
            return {"rope_type": "default"}
        raise _unknown(metadata, f"phi3.rope.scaling.type = {kind!r} without {_LONG} and {_SHORT}")
    return {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "attention_factor": attention,
        "factor": int(_needed(metadata, "context_length")) / original,
        "original_max_position_embeddings": original,
    }


def _needed(metadata: Metadata, key: str) -> Any:
    try:
        return metadata.values[key]
    except KeyError:
        raise CheckpointError(
            f"{metadata.name} is incomplete: its metadata has no {metadata.architecture}.{key}"
        ) from None


def _unknown(metadata: Metadata, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{metadata.name} has {what}, which the conversion of a GGUF does not understand: the results would "
        f"be wrong; use its safetensors checkpoint"
    )


def _is_small(field: Any) -> bool:
    """Whether it is no list of strings, such as a vocabulary."""
    return len(field.data) < 1024

"""Writes models as GGUF files, in the layout that llama.cpp's converter gives each architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    import torch

NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Sequence[float]] | None = None,
    pre: str = "default",
    parts: int = 1,
) -> Path:
    """Write ``model`` in float32. ``keys`` are metadata, without the architecture; ``tensors`` come on top.

    The shape of the model is written from its config. Return the file, or the first of so many ``parts``.
    """
    config = model.config
    found = {name: data.float().numpy() for name, data in _converted(model, architecture).items()}
    found |= {name: np.asarray(values, dtype=np.float32) for name, values in (tensors or {}).items()}
    each = -(-len(found) // parts)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=each if parts > 1 else 0)
    heads = config.num_attention_heads
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings if architecture != "bloom" else 256,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
    }
    for key, value in (own | dict(keys)).items():
        add_key(writer, key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}", value)
    add_vocabulary(writer, config.vocab_size, pre)
    for name, data in found.items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Under ``key``, in the kind that llama.cpp's converter would take; None is left out."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        writer.add_string(key, value)


def add_vocabulary(writer: gguf.GGUFWriter, size: int, pre: str = "default") -> None:
    """A tokenizer with all bytes, two words, and tokens that no text has, ``size`` in all."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|end|>", *bytes_to_unicode().values(), "he", "ll"]
    tokens += [f"<{number}>" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["h e", "l l"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)


def _converted(model: Any, architecture: str) -> dict[str, torch.Tensor]:
    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found: dict[str, torch.Tensor] = {}
    for key, data in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.gate_up_proj$", key):
            gate, up = data.chunk(2, dim=1)
            found[f"blk.{match[1]}.ffn_gate_exps.weight"] = gate
            found[f"blk.{match[1]}.ffn_up_exps.weight"] = up
            continue
        if match := re.search(r"layers\.(\d+)\.mlp\.experts\.down_proj$", key):
            found[f"blk.{match[1]}.ffn_down_exps.weight"] = data
            continue
        suffixes = (".weight", ".bias")
        name = names.get_name(key, suffixes) or names.get_name(key.removeprefix("transformer."), suffixes)
        assert name is not None, key
        found[name] = _transformed(name, data, config, architecture)
    return found


def _transformed(name: str, data: torch.Tensor, config: Any, architecture: str) -> torch.Tensor:
    if architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return data + 1
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return data.reshape(heads, 2, -1, *data.shape[1:]).transpose(1, 2).reshape(data.shape)
    if architecture == "gpt2" and data.dim() == 2 and name.startswith("blk."):
        return data.T
    if architecture == "bloom" and "attn_qkv" in name:
        parts = data.reshape(config.n_head, 3, -1, *data.shape[1:])
        return parts.transpose(0, 1).reshape(data.shape)
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return data[0]
    return data

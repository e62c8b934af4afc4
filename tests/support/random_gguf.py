"""Small random models as GGUF files, made without torch: any architecture, any type of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import add_key, add_vocabulary

WIDTH, HEADS, INNER = 64, 4, 96
ATTENTION = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (WIDTH // 2, WIDTH),
    "attn_v.weight": (WIDTH // 2, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_norm.weight": (WIDTH,),
}
GATED = {
    "ffn_gate.weight": (INNER, WIDTH),
    "ffn_up.weight": (INNER, WIDTH),
    "ffn_down.weight": (WIDTH, INNER),
}
LLAMA = ATTENTION | GATED

Shapes = Mapping[str, tuple[int, ...]]


def write_random_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    blocks: int = 4,
    each: Shapes | Iterable[Shapes] = LLAMA,
    around: Shapes | None = None,
    keys: Mapping[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    parts: int = 1,
    vocabulary: int = 0,
) -> Path:
    """Write a model; return its file, or the first of so many parts.

    ``vocabulary`` is how many tokens its tokenizer has; without, it has none.

    ``each`` has the shapes of a block's tensors, or of those of every block, as numpy has them; ``around``
    those that are not in blocks, beside embeddings and norm. Tensors of two dimensions are of the ``kind``.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary or 48, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    shapes |= dict(around or {})
    for block, own in enumerate([each] * blocks if isinstance(each, Mapping) else each):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in own.items()}
    tensors = list(shapes.items())
    size = -(-len(tensors) // parts)
    for part in range(parts):
        file = path if parts == 1 else _part(path, part, parts)
        writer = gguf.GGUFWriter(file, architecture)
        if part == 0:
            _add_keys(writer, architecture, blocks, {"vocab_size": vocabulary or 48, **(keys or {})})
            if vocabulary:
                add_vocabulary(writer, vocabulary)
            else:
                writer.add_string("tokenizer.ggml.model", "none")
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        for number, (name, shape) in enumerate(tensors[part * size : (part + 1) * size], part * size):
            _add_tensor(writer, name, shape, kind, np.random.default_rng(number))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path if parts == 1 else _part(path, 0, parts)


def _part(path: Path, part: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf")


def _add_keys(writer: gguf.GGUFWriter, architecture: str, blocks: int, keys: Mapping[str, Any]) -> None:
    own = {
        "block_count": blocks,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS // 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
    }
    for key, value in (own | dict(keys)).items():
        name = key if key.startswith("general.") else f"{architecture}.{key}"
        add_key(writer, name, value)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
    random: np.random.Generator,
) -> None:
    data = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        writer.add_tensor(name, 1 + 0.1 * data if name.endswith("norm.weight") else 0.1 * data)
        return
    data *= shape[-1] ** -0.5
    plain = name.endswith(".bias") or "_norm." in name
    if plain or kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16) or "embd" in name:
        writer.add_tensor(name, data.astype(np.float16) if kind.name == "F16" and not plain else data)
    else:
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)

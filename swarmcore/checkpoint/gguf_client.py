"""What a client needs of a GGUF whose blocks are left to llama.cpp: a config, and what is around the blocks.

For architectures of which transformers does not convert the blocks. The config has what embeddings, final
norm and head depend on, and the sizes of the blocks, which are not computed by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.printable import printable_line

_EMBEDDINGS, _NORM, _HEAD = "token_embd", "output_norm", "output"
_OF_THE_ENDS = ("embedding_scale", "logit_scale", "final_logit_softcapping")
"""Keys that change what is computed before the first block or after the last."""


@attrs.frozen
class Family:
    """An architecture of llama.cpp, as transformers has it."""

    model_type: str
    settings: Callable[[GgufModel], Mapping[str, Any]] = lambda model: {}
    """What its config has besides sizes."""
    keys: tuple[str, ...] = ()
    """Those of `_OF_THE_ENDS` that ``settings`` heeds."""


def _scaled(model: GgufModel) -> dict[str, Any]:
    return {
        "embedding_multiplier": model.own("embedding_scale", 1.0) or 1.0,
        "logits_scaling": model.own("logit_scale", 1.0) or 1.0,
    }


def _cohere(model: GgufModel) -> dict[str, Any]:
    return {"logit_scale": model.own("logit_scale", 1.0) or 1.0}


FAMILIES: Mapping[str, Family] = {
    "arcee": Family("arcee"),
    "cohere2": Family("cohere2", _cohere, ("logit_scale",)),
    "command-r": Family("cohere", _cohere, ("logit_scale",)),
    "ernie4_5": Family("ernie4_5"),
    "ernie4_5-moe": Family("ernie4_5_moe"),
    "exaone4": Family("exaone4"),
    "gpt-oss": Family("gpt_oss"),
    "granite": Family("granite", _scaled, ("embedding_scale", "logit_scale")),
    "granitemoe": Family("granitemoe", _scaled, ("embedding_scale", "logit_scale")),
    "mistral3": Family("ministral3"),
    "olmo2": Family("olmo2"),
    "olmoe": Family("olmoe"),
    "seed_oss": Family("seed_oss"),
    "smollm3": Family("smollm3"),
}
"""By the name of the architecture in files."""


def client_config(model: GgufModel) -> Any:
    """A config of transformers for the model's ends.

    Raise `UnsupportedModelError` for what would change them and is not understood, `CheckpointError` for
    sizes that are none.
    """
    from transformers import AutoConfig

    family = FAMILIES[model.architecture]
    for key in _OF_THE_ENDS:
        value = model.own(key)
        if value not in (None, 0.0, 1.0) and key not in family.keys:
            raise UnsupportedModelError(
                f"{model.name} has {model.architecture}.{key} = {value}, which is not understood of this "
                f"architecture: the results would be wrong"
            )
    heads = _size(model, "attention.head_count")
    sizes: dict[str, Any] = {
        "hidden_size": model.width,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(model, "attention.head_count_kv", heads),
        "head_dim": _size(model, "attention.key_length", model.width // heads),
        "intermediate_size": _size(model, "feed_forward_length"),
        "max_position_embeddings": _size(model, "context_length"),
        "vocab_size": _vocabulary(model),
        "tie_word_embeddings": f"{_HEAD}.weight" not in model.places,
    }
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if (epsilon := model.own(key)) is not None:
            sizes |= {"rms_norm_eps": float(epsilon), "layer_norm_eps": float(epsilon)}
    tokens = {
        f"{name}_token_id": model.value(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return AutoConfig.for_model(family.model_type, **sizes, **tokens, **family.settings(model))


def end_sources(model: GgufModel, skeleton: Any) -> dict[str, str]:
    """For each parameter of ``skeleton`` outside its blocks, the tensor of the GGUF that it is.

    ``skeleton`` is the causal language model of transformers, without memory or with. Raise
    `UnsupportedModelError` for what has no counterpart.
    """
    inputs, outputs = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    found: dict[str, str] = {}
    for path, module in skeleton.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if any(part.isdigit() for part in path.split(".")):
                continue
            source = {id(inputs): _EMBEDDINGS, id(outputs): _HEAD}.get(id(module), _NORM)
            found[f"{path}.{name}"] = f"{source}.{name}"
    if f"{_HEAD}.weight" not in model.places:
        found = {key: source for key, source in found.items() if not source.startswith(f"{_HEAD}.")}
    if len(set(found.values())) != len(found):
        raise UnsupportedModelError(
            f"{model.name} ({model.architecture}) has more around its blocks than embeddings, norm and head"
        )
    known = {*found.values(), "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    if lost := sorted(set(model.around) - known):
        raise UnsupportedModelError(
            f"{model.name} has the tensor {printable_line(lost[0])}, which its class has no place for"
        )
    if absent := [source for source in found.values() if source not in model.places]:
        raise CheckpointError(f"{model.name} is incomplete: it has no tensor {absent[0]}")
    return found


def _size(model: GgufModel, key: str, default: int | None = None) -> int:
    found = model.own(key, default)
    if isinstance(found, list) and found:
        found = max(found)
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{model.name} is damaged: its {model.architecture}.{key} is {found!r}")
    return found


def _vocabulary(model: GgufModel) -> int:
    embeddings = model.places.get(f"{_EMBEDDINGS}.weight")
    if embeddings is None or len(embeddings.tensor.shape) != 2:
        raise CheckpointError(f"{model.name} is incomplete: it has no embeddings of tokens")
    return embeddings.tensor.shape[1]

"""What a model's generation_config.json asks for: done by transformers' logits processors, or refused."""

from __future__ import annotations

import copy
import inspect
import json
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.generation_settings import (
    ENDING_FIELDS,
    FOLLOWED_FIELDS,
    PENALTY_FIELDS,
    SAMPLING_FIELDS,
    GenerationSettings,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

    from swarmcore.checkpoint import Checkpoint

_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (),
    "max_time": (),
    "assistant_ensemble_weight": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "cache_implementation": (
        *("dynamic", "static", "offloaded", "offloaded_static", "paged"),
        *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
}
"""Fields that would make another text, and the values besides None and False that would not."""

_WITHOUT_EFFECT = frozenset(
    {
        # whether to sample is for the caller to say
        "do_sample",
        # beams, of which there is one
        *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory"),
        # how fast it goes
        *("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config"),
        *("disable_compile", "continuous_batching_config", "use_mtp", "speculation_type", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
        # what else comes back besides the tokens
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        "return_dict_in_generate",
        # tokens of prompts, padding, and models with an encoder
        *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
        # notes about the file and the model
        *("transformers_version", "architectures", "model_type", "torch_dtype", "dtype", "auto_map"),
        *("attn_implementation", "trust_remote_code", "chat_format", "return_legacy_cache"),
    }
)


def load_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The checkpoint's, with all that its file says; or what its config.json says of generation."""
    from transformers import GenerationConfig

    path = checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(checkpoint.config)
    try:
        config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        named: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, value in named.items():
            if not hasattr(config, name):  # transformers drops some that it does not know
                setattr(config, name, value)
    except Exception as exc:  # its checks of values raise whatever comparing them does
        raise CheckpointError(f"generation_config.json of {checkpoint.name} cannot be read: {exc}") from exc
    return config


def check_generation_config(config: GenerationConfig, model: str) -> None:
    """Raise `UnsupportedModelError` for fields that would make another text than is made here, and
    `CheckpointError` for where a text ends if that makes no sense; both by name."""
    refused = [name for name, fine in _REFUSED.items() if _asks(getattr(config, name, None), fine)]
    known = FOLLOWED_FIELDS | _REFUSED.keys() | _WITHOUT_EFFECT
    usual = vars(_defaults())
    unknown = [
        name
        for name, value in vars(config).items()
        if name not in known and not name.startswith("_") and _asks(value, (usual.get(name),))
    ]
    if refused or unknown:
        fields = ", ".join(f"{name}={getattr(config, name)!r:.60}" for name in [*refused, *unknown])
        why = "cannot be done here" if refused else "is unknown here"
        raise UnsupportedModelError(
            f"the generation config of {model} asks for what {why}: {fields}; to go on without, set it "
            f"to None in generation_config.json, or in model.generation_config of the loaded model"
        )

    for name in sorted(ENDING_FIELDS):
        value = getattr(config, name, None)
        if value is not None and not _makes_sense(name, value):
            raise CheckpointError(f"{name} in the generation config of {model} makes no sense: {value!r:.60}")


def end_of_text(config: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    return _flat(config.eos_token_id)


def stop_strings(config: GenerationConfig) -> list[str]:
    """The texts before the first of which a text ends."""
    return _list(config.stop_strings)


def most_tokens(config: GenerationConfig, settings: GenerationSettings, prompt: int) -> int:
    """Tokens, those of the ``prompt`` included, at which a text ends at the latest."""
    if settings.max_new_tokens is not None:
        return prompt + settings.max_new_tokens
    own: list[int] = [prompt + config.max_new_tokens] if config.max_new_tokens is not None else []
    if not own and config.max_length is not None:
        own = [config.max_length]
    if own and own[0] <= prompt:
        raise UnsupportedModelError(
            f"the prompt has {prompt} tokens, and the model's generation config ends texts at {own[0]} in "
            f"all; pass max_new_tokens"
        )
    return min([prompt + settings.most_new_tokens, *own])


def logits_processors(
    config: GenerationConfig,
    settings: GenerationSettings,
    prompt: Sequence[int],
    *,
    max_length: int,
    model_config: PretrainedConfig,
) -> LogitsProcessorList:
    """Those of transformers' ``generate``, in its order, for one sequence, with the caller's own among them.

    What ``settings`` leave at None is as ``config`` says; without a temperature what only matters when
    sampling is left out. Raise `UnsupportedModelError` for values that transformers does not take.
    """
    import torch
    from transformers import LogitsProcessorList

    from swarmcore.client.generation.logits_processors import faster

    merged = _merged(config, settings)
    eos = end_of_text(config)
    asked = [name for name in (*PENALTY_FIELDS, *SAMPLING_FIELDS) if getattr(merged, name, None) is not None]
    if not asked:
        return LogitsProcessorList(settings.logits_processors)
    if unknown := [name for name in asked if not hasattr(_defaults(), name)]:
        raise UnsupportedModelError(
            f"the generation config of the model asks for {', '.join(unknown)}, which the installed "
            f"transformers does not know; install a later one"
        )
    merged.max_length = max_length
    merged._eos_token_tensor = torch.tensor(eos) if eos else None
    make, parameters = _factory()
    given = {
        "generation_config": merged,
        "input_ids_seq_length": len(prompt),
        "encoder_input_ids": torch.tensor([prompt]),
        "prefix_allowed_tokens_fn": None,
        "logits_processor": LogitsProcessorList(settings.logits_processors),
        "device": "cpu",
        "model_kwargs": {},
    }
    try:
        _check_tokens(merged, asked, eos, model_config.vocab_size)
        found: LogitsProcessorList = make(
            model_config, **{name: value for name, value in given.items() if name in parameters}
        )
    except (ValueError, TypeError, IndexError, RuntimeError) as exc:
        raise UnsupportedModelError(
            f"the generation config of the model asks for what transformers does not take, in one of "
            f"{', '.join(asked)}: {exc}"
        ) from exc
    return faster(found, exact=settings.seed is not None)


def _merged(config: GenerationConfig, settings: GenerationSettings) -> GenerationConfig:
    """A copy of ``config`` as the caller wants it, in which None is off."""
    merged = copy.copy(config)
    for name in (*PENALTY_FIELDS, *SAMPLING_FIELDS):
        if (value := getattr(settings, name, None)) is not None:
            setattr(merged, name, value)
    merged.num_beams = 1
    merged.do_sample = not settings.greedy
    merged.temperature = settings.temperature
    if merged.min_new_tokens is not None:
        merged.min_length = None
    for name, off in {**PENALTY_FIELDS, **SAMPLING_FIELDS}.items():
        unused = settings.greedy and name in SAMPLING_FIELDS
        if unused or not _asks(getattr(merged, name, None), (off,)):
            setattr(merged, name, None)
    return merged


def _asks(value: Any, off: tuple[Any, ...]) -> bool:
    """Whether a field's value asks for something."""
    if value is None or value is False or (isinstance(value, Sequence | Mapping) and len(value) == 0):
        return False
    return value not in off


def _check_tokens(
    config: GenerationConfig, asked: Sequence[str], eos: Sequence[int], vocab_size: int
) -> None:
    """Refuse ids that would raise in the middle of a text, or stand for another token (-1 for the last one).

    A token that is suppressed, or ends texts, and that the model does not have, never comes.
    """
    biases = config.sequence_bias or []
    ids = {
        "bad_words_ids": config.bad_words_ids,
        "sequence_bias": list(biases) if isinstance(biases, Mapping) else [pair[0] for pair in biases],
        "forced_bos_token_id": config.forced_bos_token_id,
        "forced_eos_token_id": config.forced_eos_token_id,
        "exponential_decay_length_penalty": eos or None,
    }
    for name in asked:
        wrong = [token for token in _flat(ids.get(name)) if not 0 <= token < vocab_size]
        if wrong:
            raise UnsupportedModelError(
                f"{name} of the model's generation config is about tokens that it does not have: "
                f"{wrong[:5]}; its ids are from 0 to {vocab_size - 1}"
            )
    if "exponential_decay_length_penalty" in asked and not eos:
        raise UnsupportedModelError(
            "exponential_decay_length_penalty of the model's generation config is about the end of a text, "
            "and no eos_token_id says which token that is"
        )


def _makes_sense(name: str, value: Any) -> bool:
    try:
        if name == "stop_strings":
            return all(isinstance(text, str) and text for text in _list(value))
        return _flat(value) is not None if name == "eos_token_id" else operator.index(value) > 0
    except TypeError:
        return False


def _list(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())


def _flat(ids: Any) -> list[int]:
    if ids is None:
        return []
    if isinstance(ids, list | tuple):
        return [token for part in ids for token in _flat(part)]
    return [operator.index(ids)]


@lru_cache(1)
def _defaults() -> GenerationConfig:
    """The fields that the installed transformers has, as they are when nobody sets them."""
    from transformers import GenerationConfig

    return GenerationConfig()


@lru_cache(1)
def _factory() -> tuple[Any, frozenset[str]]:
    """What makes the processors of transformers' ``generate``, and the names of what it takes."""
    from transformers import GenerationMixin

    class Maker(GenerationMixin):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig) -> None:
            self.config = config

    method = getattr(GenerationMixin, "_get_logits_processor", None)
    if method is None:
        raise UnsupportedModelError(
            "the installed transformers makes no logits processors as this version of swarmcore knows it: "
            "install another version, or generate without penalties and filters"
        )

    def make(config: PretrainedConfig, **given: Any) -> Any:
        return Maker(config)._get_logits_processor(**given)

    return make, frozenset(inspect.signature(method).parameters)

"""A model's own generation settings: each is what transformers makes of it, or refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from swarmcore.client.generation import generation_config
from swarmcore.client.generation.generation_config import (
    check_generation_config,
    load_generation_config,
    logits_processors,
    most_tokens,
)
from swarmcore.errors import CheckpointError, InputError, UnsupportedModelError
from swarmcore.generation_settings import GenerationSettings

PROMPT = "abcabcabc"
SYNTH_ID = {"keys": [654, 400, 836, 123, 340, 443, 597, 160, 57], "ngram_len": 3}


def settings_of(top: list[int]) -> dict[str, dict[str, Any]]:
    """Settings that change a greedy text which begins with ``top``."""
    return {
        "bad_words_ids": {"bad_words_ids": [[top[0]], [top[2], top[3]]]},
        "sequence_bias": {"sequence_bias": [[[top[0]], -50.0], [[top[1], top[2]], -50.0]]},
        "suppress_tokens": {"suppress_tokens": [top[0], 5]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [top[0]]},
        "forced_eos_token_id": {"forced_eos_token_id": 256},
        "forced_eos_token_ids": {"forced_eos_token_id": [256, 3]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 6.0},
        "repetition_penalty": {"repetition_penalty": 1.7},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
        "min_length": {"min_length": 20, "eos_token_id": top[1]},
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [top[1], top[3]]},
        "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
        "all": {
            "repetition_penalty": 1.2,
            "bad_words_ids": [[top[0]]],
            "suppress_tokens": [top[1]],
            "renormalize_logits": True,
            "remove_invalid_values": True,
            "sequence_bias": {(9,): 3.0},
        },
    }


CASES = sorted(settings_of([1, 2, 3, 4]))


def configure(model: Any, settings: dict[str, Any]) -> None:
    model.generation_config = GenerationConfig(**{"eos_token_id": 256, "pad_token_id": 0, **settings})


@pytest.mark.parametrize("case", CASES)
async def test_greedy_choice_is_transformers(model, plain_tokens, case):
    plainly = plain_tokens(PROMPT, 14)
    settings = settings_of(plainly)[case]
    configure(model, settings)
    expected = plain_tokens(PROMPT, 14, **settings)
    assert expected != plainly
    generation = model.generate(PROMPT, max_new_tokens=14)
    await generation
    assert generation.tokens == expected

    rest = model.generate(PROMPT, max_new_tokens=14, so_far=expected[:3])
    await rest
    assert rest.tokens == expected, "a text that broke off goes on with the same settings"

    batch = model.generate_batch(["x", PROMPT, "Ünïcödé"], max_new_tokens=14)
    await batch
    assert batch.tokens[1] == expected, "prompts of other lengths beside it change nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.05},
        {"top_h": 0.4},
        {"top_k": 7, "top_p": 0.9, "min_p": 0.02},
        {"watermarking_config": WatermarkingConfig(bias=9.0)},
        {"watermarking_config": SynthIDTextWatermarkingConfig(**SYNTH_ID)},
        {"renormalize_logits": True, "bad_words_ids": [[7]]},
    ],
    ids=str,
)
async def test_seeded_sampling_is_transformers(model, plain_tokens, settings):
    expected = plain_tokens(PROMPT, 12, seed=3, temperature=1.5, **{"top_k": 0, **settings})
    configure(model, settings)
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3}
    generation = model.generate(PROMPT, **options)
    await generation
    assert generation.tokens == expected
    rest = model.generate(PROMPT, so_far=expected[:5], **options)
    await rest
    assert rest.tokens == expected


async def test_what_only_matters_when_sampling_leaves_greedy_choice_alone(model, plain_tokens):
    configure(model, {"top_k": 3, "top_p": 0.1, "typical_p": 0.1, "do_sample": True, "temperature": 3.0})
    generation = model.generate(PROMPT, max_new_tokens=8)
    await generation
    assert generation.tokens == plain_tokens(PROMPT, 8)


async def test_the_callers_settings_come_before_the_models(model, plain_tokens):
    plainly = plain_tokens(PROMPT, 14)
    own = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_length": 30, "eos_token_id": plainly[5]}
    configure(model, own)
    generation = model.generate(
        PROMPT, max_new_tokens=14, repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0
    )
    await generation
    assert generation.tokens == plainly[: plainly.index(plainly[5]) + 1]


def test_fields_of_later_and_of_earlier_versions_of_transformers(monkeypatch):
    others = GenerationConfig()
    others.field_to_come = 20
    del others.typical_p
    monkeypatch.setattr(generation_config, "_defaults", lambda: others)
    config = GenerationConfig(typical_p=0.5)
    config.field_to_come = 20
    check_generation_config(config, "m")
    with pytest.raises(UnsupportedModelError, match="typical_p, which the installed"):
        sampling = GenerationSettings(temperature=1.0)
        logits_processors(config, sampling, [1], max_length=9, model_config=SimpleNamespace(vocab_size=9))
    config.field_to_come = 21
    with pytest.raises(UnsupportedModelError, match="field_to_come=21"):
        check_generation_config(config, "m")


async def test_stop_strings_of_the_model_end_the_text(model, plain_tokens):
    whole = model.tokenizer.decode(plain_tokens("The sea", 30))
    configure(model, {"stop_strings": [whole[8:11], "never said"]})
    generation = model.generate("The sea", max_new_tokens=30)
    assert await generation == whole[: whole.index(whole[8:11])]
    assert generation.finish_reason == "stop"
    other = model.generate("The sea", max_new_tokens=30, stop=whole[12:15])
    assert await other == whole[: whole.index(whole[12:15])]


async def test_where_the_models_own_settings_end_a_text(model):
    async def tokens(**options: Any) -> int:
        generation = model.generate(PROMPT, **options)
        await generation
        return generation.new_tokens

    configure(model, {"max_new_tokens": 5})
    assert (await tokens(), await tokens(max_new_tokens=7)) == (5, 7)
    configure(model, {"max_length": 15})
    assert (await tokens(), await tokens(max_new_tokens=9)) == (6, 9)
    configure(model, {"max_length": 9})
    with pytest.raises(InputError, match="pass max_new_tokens"):
        await tokens()


def test_nothing_but_the_caller_ends_a_text_later_than_is_usual():
    settings = GenerationSettings()
    assert most_tokens(GenerationConfig(), settings, 10) == 266
    assert most_tokens(GenerationConfig(max_new_tokens=4096), settings, 10) == 266
    assert most_tokens(GenerationConfig(max_length=20), GenerationSettings(max_new_tokens=99), 10) == 109


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("constraints", ["x"]),
        ("force_words_ids", [[1]]),
        ("token_healing", True),
        ("max_time", 5.0),
        ("cache_implementation", "quantized"),
        ("assistant_ensemble_weight", 0.5),
        ("presence_penalty", 0.5),
        ("a_setting_to_come", 0.5),
        ("stop_words_ids", [[13]]),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(model, sessions, name, value):
    setattr(model.generation_config, name, value)
    with pytest.raises(UnsupportedModelError, match=name):
        await model.generate("ab", max_new_tokens=2)
    assert not sessions.opened
    setattr(model.generation_config, name, None)
    await model.generate("ab", max_new_tokens=2)


def test_every_field_of_the_installed_transformers_is_known():
    config = GenerationConfig()
    for name in [name for name in vars(config) if not name.startswith("_")]:
        setattr(config, name, None)
    check_generation_config(config, "m")
    everything = GenerationConfig(
        **dict.fromkeys(("num_beams", "num_return_sequences", "guidance_scale", "top_k", "pad_token_id"), 1),
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=True,
        cache_implementation="static",
        early_stopping=False,
        transformers_version="4.0",
        prompt_lookup_num_tokens=3,
        num_assistant_tokens=5,
        disable_compile=True,
    )
    check_generation_config(everything, "m")
    unknown = [
        name
        for name in vars(GenerationConfig())
        if not name.startswith("_") and is_unknown(GenerationConfig(), name)
    ]
    assert not unknown


def is_unknown(config: GenerationConfig, name: str) -> bool:
    setattr(config, name, 0.123)
    try:
        check_generation_config(config, "m")
    except UnsupportedModelError as exc:
        return "unknown" in str(exc)
    except CheckpointError:
        return False
    return False


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bad_words_ids": [[1], [257]]}, "bad_words_ids.*257"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids.*-1"),
        ({"sequence_bias": {(300,): 1.0}}, "sequence_bias.*300"),
        ({"sequence_bias": [[[300, 2], 1.0]]}, "sequence_bias.*300"),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id.*-1"),
        ({"forced_bos_token_id": 999}, "forced_bos_token_id.*999"),
        ({"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": 999}, "exponential_decay.*999"),
        ({"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": None}, "no eos_token_id"),
        ({"repetition_penalty": -2.0}, "repetition_penalty.*strictly positive"),
        ({"bad_words_ids": "ab"}, "bad_words_ids"),
        ({"suppress_tokens": "ab"}, "suppress_tokens"),
    ],
)
async def test_values_that_cannot_work_are_refused_before_anything_is_sent(model, sessions, settings, says):
    configure(model, settings)
    with pytest.raises(UnsupportedModelError, match=says):
        await model.generate("ab", max_new_tokens=2)
    assert not sessions.opened


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "256"),
        ("eos_token_id", [2.5]),
        ("max_new_tokens", 5.5),
        ("max_length", "20"),
        ("max_length", 0),
        ("stop_strings", 5),
        ("stop_strings", ["", "a"]),
    ],
)
async def test_ends_of_a_text_that_make_no_sense(model, sessions, name, value):
    setattr(model.generation_config, name, value)
    with pytest.raises(CheckpointError, match=name):
        await model.generate("ab", max_new_tokens=2)
    assert not sessions.opened


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": [256, 999, -1]},
        {"eos_token_id": -1},
        {"eos_token_id": None},
        {"eos_token_id": []},
        {"suppress_tokens": [999, -1]},
        {"begin_suppress_tokens": [999]},
        {"min_new_tokens": 4, "eos_token_id": [999]},
        {"bad_words_ids": [], "suppress_tokens": [], "sequence_bias": {}, "stop_strings": []},
    ],
)
async def test_tokens_that_the_model_does_not_have_never_come(model, plain_tokens, settings):
    configure(model, settings)
    generation = model.generate("The sea", max_new_tokens=6)
    await generation
    assert generation.tokens == plain_tokens("The sea", 6)


def test_no_processors_are_made_when_nothing_asks_for_them():
    config = GenerationConfig(
        eos_token_id=2,
        repetition_penalty=1.0,
        min_length=0,
        top_k=50,
        top_p=0.9,
        suppress_tokens=[],
        typical_p=1.0,
        renormalize_logits=False,
        no_repeat_ngram_size=0,
    )
    own = SimpleNamespace()  # nothing is read of the model's config
    assert not logits_processors(config, GenerationSettings(), [1, 2], max_length=9, model_config=own)


def test_the_models_config_is_left_as_it_was():
    config = GenerationConfig(eos_token_id=2, repetition_penalty=1.3, min_length=3)
    before = config.to_dict()
    own = SimpleNamespace(is_encoder_decoder=False, vocab_size=10)
    settings = GenerationSettings(temperature=0.5, min_new_tokens=2)
    assert len(logits_processors(config, settings, [1, 2], max_length=9, model_config=own)) == 3
    assert config.to_dict() == before


def checkpoint_with(folder: Any, **fields: Any) -> Any:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return SimpleNamespace(folder=folder, name="m")


def test_fields_that_transformers_drops_are_seen(tmp_path):
    config = load_generation_config(checkpoint_with(tmp_path, _from_model_config=True, novel_penalty=2.0))
    with pytest.raises(UnsupportedModelError, match="novel_penalty"):
        check_generation_config(config, "m")


@pytest.mark.parametrize("fields", [{"max_new_tokens": "many"}, {"streamer": 1}, {"max_new_tokens": -1}])
def test_a_file_that_cannot_be_read(tmp_path, fields):
    with pytest.raises(CheckpointError, match=r"generation_config\.json of m"):
        load_generation_config(checkpoint_with(tmp_path, **fields))

"""Generation settings: ranges, defaults, and what an error says."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest

from swarmcore.errors import InputError
from swarmcore.generation_settings import (
    SETTINGS,
    WIRE_SETTINGS,
    GenerationOptions,
    GenerationSettings,
)
from swarmcore.wire.generate import OpenGeneration


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", 2.5, "whole number"),
        ("temperature", -0.1, r"0 \(greedy\) or more"),
        ("temperature", math.nan, "or more"),
        ("temperature", math.inf, "or more"),
        ("temperature", "hot", "or more"),
        ("temperature", True, "or more"),
        ("temperature", 1e39, "up to a million"),
        ("temperature", -1e-300, "or more"),
        ("top_k", -1, r"0 \(off\) or more"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 1.01, r"from 0 to 1"),
        ("top_p", -0.5, r"from 0 to 1"),
        ("min_p", 2, r"from 0 \(off\) to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("no_repeat_ngram_size", -2, "or more"),
        ("min_new_tokens", -1, "or more"),
        ("seed", -1, r"2\*\*63"),
        ("seed", 2**64, r"2\*\*63"),
        ("seed", True, "whole number"),
        ("stop", "", "none of them empty"),
        ("stop", ["a", ""], "none of them empty"),
        ("stop", [3], "a list of texts"),
        ("stop", 3, "a list of texts"),
        ("stop", b"end", "a list of texts"),
        ("stop", "\ud83d", "half a character"),
        ("logits_processors", 3, "a list of functions"),
        ("logits_processors", ["x"], "a list of functions"),
        ("chat_template_kwargs", ["x"], "keyword arguments"),
        ("repetition_penalty", math.inf, "above 0"),
    ],
)
def test_values_out_of_range(name, value, says):
    with pytest.raises(InputError, match=says) as raised:
        GenerationSettings(**{"temperature": 1.0, name: value})
    assert name in str(raised.value)


def test_filters_without_a_temperature_are_not_ignored_in_silence():
    with pytest.raises(InputError, match="top_k, top_p only matter"):
        GenerationSettings(top_k=5, top_p=0.9)
    assert GenerationSettings(top_k=5, temperature=0).greedy


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "did you mean temperature"),
        ("top_kk", "did you mean top_k"),
        ("max_tokens", "there is max_new_tokens"),
        ("num_beams", "a session's `sources`"),
        ("do_sample", "temperature"),
        ("bad_words_ids", r"model\.generation_config\.bad_words_ids"),
        ("zzz", "there are max_new_tokens, temperature"),
    ],
)
def test_unknown_names_are_refused_with_what_may_have_been_meant(name, hint):
    with pytest.raises(InputError, match=hint) as raised:
        GenerationSettings.of({"temperature": 1.0, name: 1})
    assert f"no option {name!r}" in str(raised.value)


def test_numbers_of_other_libraries_are_numbers():
    settings = GenerationSettings(
        max_new_tokens=np.int64(5), temperature=np.float32(0.5), top_k=np.uint8(3), seed=np.int32(1)
    )
    values = (settings.max_new_tokens, settings.temperature, settings.top_k, settings.seed)
    assert values == (5, 0.5, 3, 1)
    assert [type(value) for value in values] == [int, float, int, int]


@pytest.mark.parametrize("temperature", [0, 0.0, 5e-324, 1e-45, 1e-40])
def test_temperatures_that_leave_the_likeliest_token_alone_are_greedy(temperature):
    assert GenerationSettings(temperature=temperature, top_k=3).greedy
    assert not GenerationSettings(temperature=1e-20).greedy


def test_the_keyword_arguments_are_the_fields():
    assert set(GenerationOptions.__annotations__) == set(GenerationSettings.__annotations__)


def test_what_goes_over_the_wire_has_the_names_of_settings():
    about_the_text = {"model", "text", "messages", "tokens", "so_far", "adapter", "default_length"}
    assert attrs.fields_dict(OpenGeneration).keys() - about_the_text == WIRE_SETTINGS
    assert SETTINGS.keys() - WIRE_SETTINGS == {"logits_processors", "chat_template_kwargs", "speculation"}


def test_prompts_of_a_batch_have_seeds_of_their_own():
    settings = GenerationSettings(temperature=1.0, seed=5)
    assert [settings.for_prompt(i).seed for i in range(3)] == [5, 6, 7]
    assert GenerationSettings().for_prompt(3).seed is None

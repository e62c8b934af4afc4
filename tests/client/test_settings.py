"""Generation settings: ranges, defaults, and what an error says."""

from __future__ import annotations

import math

import pytest
from transformers import GenerationConfig

from swarmcore.client.settings import GenerationOptions, GenerationSettings
from swarmcore.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", 2.5, "whole number"),
        ("max_new_tokens", None, "1 or more"),
        ("temperature", -0.1, r"0 \(greedy\) or more"),
        ("temperature", math.nan, "or more"),
        ("temperature", math.inf, "or more"),
        ("temperature", "hot", "or more"),
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


def test_unknown_names_are_refused():
    with pytest.raises(TypeError):
        GenerationSettings(temprature=1.0)


def test_the_keyword_arguments_are_the_fields():
    assert set(GenerationOptions.__annotations__) == set(GenerationSettings.__annotations__)


def test_the_models_own_settings_are_the_defaults():
    config = GenerationConfig(top_k=40, top_p=0.9, repetition_penalty=1.1, temperature=0.6, do_sample=True)
    sampling = GenerationSettings(temperature=1.0, top_p=0.5).with_defaults(config)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 40, 0.5)
    assert sampling.repetition_penalty == 1.1
    greedy = GenerationSettings().with_defaults(config)
    assert greedy.greedy, "without a temperature of the caller's the choice is greedy"
    assert (greedy.top_k, greedy.repetition_penalty) == (None, 1.1)


def test_prompts_of_a_batch_have_seeds_of_their_own():
    settings = GenerationSettings(temperature=1.0, seed=5)
    assert [settings.for_prompt(i).seed for i in range(3)] == [5, 6, 7]
    assert GenerationSettings().for_prompt(3).seed is None

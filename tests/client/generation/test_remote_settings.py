"""A generation server makes of settings, the caller's and the model's own, what a client with the model
makes."""

from __future__ import annotations

from typing import Any

import pytest
from head_swarm import head_swarm
from transformers import GenerationConfig

PROMPT = "abcabcabc"


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ({}, {"max_new_tokens": 9}),
        ({"max_new_tokens": 7}, {}),
        ({"max_new_tokens": 7}, {"max_new_tokens": 9}),
        ({"max_length": 15}, {}),
        ({"stop_strings": "X"}, {"max_new_tokens": 30}),
        ({"bad_words_ids": [[65]], "repetition_penalty": 1.3}, {"max_new_tokens": 12}),
        ({"repetition_penalty": 1.3}, {"max_new_tokens": 12, "repetition_penalty": 1.0}),
        ({"forced_eos_token_id": 256}, {"max_new_tokens": 6}),
        ({"typical_p": 0.4}, {"max_new_tokens": 12, "temperature": 1.5, "seed": 4}),
        ({}, {"max_new_tokens": 8, "temperature": 1e-40, "seed": 4}),
        ({}, {"max_new_tokens": 8, "temperature": 0.001, "seed": 4}),
    ],
    ids=str,
)
async def test_the_same_text(model, plain_tokens, own: dict[str, Any], options: dict[str, Any]) -> None:
    if own.get("stop_strings") == "X":
        own = {"stop_strings": model.tokenizer.decode(plain_tokens(PROMPT, 20))[9:12]}
    model.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=0, **own)
    whole = model.generate(PROMPT, **options)
    text = await whole
    async with head_swarm(model) as swarm:
        thin = swarm.client.generate(PROMPT, **options)
        assert await thin == text
    assert thin.tokens == whole.tokens
    assert thin.finish_reason == whole.finish_reason

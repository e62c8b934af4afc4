"""A text that broke off goes on as if it had not, from its tokens alone."""

from __future__ import annotations

from typing import Any

import pytest

from swarmcore.errors import InputError

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_k": 0},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 8},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cut", [1, 5, 15])
async def test_the_rest_is_what_it_would_have_been(model, options, cut):
    whole = model.generate("Ünïcödé 日本", max_new_tokens=16, **options)
    pieces = {}
    async for piece in whole:
        pieces[whole.new_tokens] = piece
    rest = model.generate("Ünïcödé 日本", max_new_tokens=16, so_far=whole.tokens[:cut], **options)
    text = await rest
    assert rest.tokens == whole.tokens
    assert text == "".join(piece for tokens, piece in pieces.items() if tokens > cut)
    assert rest.finish_reason == whole.finish_reason


async def test_it_goes_on_in_a_stop_string(model, plain_tokens):
    tokens = plain_tokens("The sea", 20)
    said = model.tokenizer.decode(tokens)
    stop = next(said[i : i + 3] for i in range(6, 15) if said.find(said[i : i + 3]) == i)
    options = {"max_new_tokens": 20, "stop": stop, "speculation": "off"}  # for pieces of one token
    whole = model.generate("The sea", **options)
    text = await whole
    assert whole.finish_reason == "stop"
    for cut in range(len(whole.tokens)):
        before = model.generate("The sea", **options)
        had = "".join([piece async for piece in before if before.new_tokens <= cut])
        rest = model.generate("The sea", so_far=whole.tokens[:cut], **options)
        assert had + await rest == text
        assert rest.finish_reason == "stop"


async def test_an_answer_that_is_complete_opens_no_session(model, sessions):
    whole = model.generate("The sea", max_new_tokens=6)
    await whole
    opened = len(sessions.opened)
    again = model.generate("The sea", max_new_tokens=6, so_far=whole.tokens)
    assert await again == ""
    assert (again.finish_reason, again.new_tokens) == ("length", 6)
    assert len(sessions.opened) == opened


async def test_tokens_that_cannot_be_so_far(model):
    for wrong in ([300], [-1], [65, 256, 65], [65] * 7):
        with pytest.raises(InputError):
            await model.generate("The sea", max_new_tokens=6, so_far=wrong)


async def test_a_prompt_is_encoded_once(model, plain_tokens):
    encoded = await model.encode([{"role": "user", "content": "Hi"}])
    assert encoded.tokens == model.tokenizer("<user>Hi\n<assistant>")["input_ids"]
    generation = model.generate(encoded, max_new_tokens=8)
    await generation
    assert generation.tokens == plain_tokens("<user>Hi\n<assistant>", 8)
    with pytest.raises(InputError, match="empty"):
        await model.encode("")

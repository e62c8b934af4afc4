"""What may be a prompt, and what is told who passes something else."""

from __future__ import annotations

import array
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer

from swarmcore.errors import InputError
from swarmcore.prompts import checked_prompt, encode_prompt


@pytest.mark.parametrize(
    "prompt",
    [
        [97, 98],
        (97, 98),
        [[97, 98]],
        range(97, 99),
        torch.tensor([97, 98]),
        torch.tensor([[97, 98]], dtype=torch.int32),
        np.array([97, 98], dtype=np.uint8),
        np.array([[97, 98]]),
        [np.int64(97), np.int64(98)],
        array.array("i", [97, 98]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_any_kind(prompt: Any) -> None:
    encoded = encode_prompt(byte_tokenizer(), prompt, vocab_size=257)
    assert encoded.tokens == [97, 98] == encoded.context
    assert all(type(token) is int for token in encoded.tokens)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "got NoneType None"),
        (5, "got int 5"),
        (0.5, "got float"),
        (True, "got bool"),
        (b"ab", "got bytes"),
        (bytearray(b"ab"), "got bytearray"),
        (memoryview(b"ab"), "got memoryview"),
        ([True], "got list"),
        ([1.0], "got list"),
        ([b"ab"], "got list"),
        (["ab"], "several prompts are for generate_batch"),
        ([[1, 2], [3, 4]], "got list"),
        ([None], "got list"),
        (torch.tensor([1.5]), r"got Tensor of shape \(1,\)"),
        (torch.tensor([True]), "got Tensor"),
        (torch.tensor(3), r"got Tensor of shape \(\)"),
        (torch.zeros(2, 3, dtype=torch.long), r"got Tensor of shape \(2, 3\)"),
        (np.zeros((1, 2, 3), dtype=int), r"got ndarray of shape \(1, 2, 3\)"),
        (np.array(["ab"]), "got ndarray"),
        ({"role": "user", "content": "ab"}, "got dict"),
        (UserDict(input_ids=[1]), "pass its input_ids"),
        ((i for i in [1, 2]), "got generator"),
        ({1, 2}, "got set"),
        ([{"role": "user"}], "got the message"),
        ([{"role": "user", "content": None}], "got the message"),
        ([{"content": "ab"}], "got the message"),
        ([{"role": 3, "content": "ab"}], "got the message"),
        ([{"role": "user", "content": "ab"}, 5], "got list"),
        ([{"role": "user", "content": b"ab"}], "content of a message is text; got bytes"),
        ([{"role": "user", "content": 5}], "content of a message is text; got int"),
        ("abc \ud83d", "the prompt has half a character .* at 4"),
        ([{"role": "user", "content": "\udfff"}], "content has half a character"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_prompt(prompt: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        checked_prompt(prompt)


@pytest.mark.parametrize("prompt", ["", [], np.array([], dtype=int), torch.tensor([[]], dtype=torch.long)])
def test_an_empty_prompt(prompt: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        encode_prompt(byte_tokenizer(), prompt, vocab_size=257)


@pytest.mark.parametrize("prompt", [[-1], [257], [2**70], np.array([-1]), "a"])
def test_tokens_that_the_model_does_not_have(prompt: Any) -> None:
    with pytest.raises(InputError, match="token ids must be from 0 to"):
        encode_prompt(byte_tokenizer(), prompt, vocab_size=257 if prompt != "a" else 60)


def test_messages_may_have_more_than_text() -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": [{"type": "text", "text": "ab"}]},
    ]
    assert checked_prompt(messages) == messages


async def test_steps_take_arrays(model: Any) -> None:
    async with model.session(sequences=2) as session:
        logits = await session.step(torch.tensor([[1, 2], [3, 4]]))
        assert session.tokens == ((1, 2), (3, 4))
        session.rollback(0)
        assert torch.equal(await session.step([[np.int64(1), 2], np.array([3, 4])]), logits)
        for wrong in ([[1.5], [2]], ["ab", [1]], [b"ab", [1]], [None, [1]], torch.tensor([[0.5], [1.0]])):
            with pytest.raises(InputError, match="token ids are whole numbers"):
                await session.step(wrong)
        assert session.tokens == ((1, 2), (3, 4))


async def test_an_array_of_tokens_so_far(model: Any) -> None:
    whole = model.generate("ab", max_new_tokens=6)
    await whole
    rest = model.generate("ab", max_new_tokens=6, so_far=torch.tensor(whole.tokens[:3]))
    await rest
    assert rest.tokens == whole.tokens


async def test_a_message_that_is_to_be_continued(model: Any) -> None:
    """What the prompt's last character lacks is the answer's."""
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    options = {"continue_final_message": True, "add_generation_prompt": False}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bé"}]
    encoded = await model.encode(messages, chat_template_kwargs=options)
    assert encoded.context == encoded.tokens == list(model.tokenizer("abé")["input_ids"])
    assert not (await model.encode(messages)).context


@pytest.mark.parametrize(
    "prompts", ["ab", None, 5, {"ab"}, np.array([[1, 2], [1, 0]]), torch.tensor([[1, 2]]), [], iter(["ab"])]
)
async def test_what_is_no_list_of_prompts(model: Any, prompts: Any) -> None:
    with pytest.raises(InputError, match="generate_batch takes a list of prompts"):
        model.generate_batch(prompts)


async def test_a_prompt_that_is_none_in_a_chat(model: Any) -> None:
    async with model.chat() as chat:
        for text in (None, 5, "\ud83d"):
            with pytest.raises(InputError, match="text"):
                chat.say(text)
        with pytest.raises(InputError, match="did you mean temperature"):
            chat.say("Hi", temprature=1.0)
        assert not chat.messages

"""Conversations: what was said is remembered, and not computed again."""

from __future__ import annotations

import pytest

from swarmcore.errors import InputError, PeerUnreachableError


async def test_turns_continue_in_one_session(model, plain_tokens, sessions):
    async with model.chat(system="Be brief") as chat:
        first = "".join([piece async for piece in chat.say("Hi", max_new_tokens=6)])
        prompt = "<system>Be brief\n<user>Hi\n<assistant>"
        assert first == model.tokenizer.decode(plain_tokens(prompt, 6), skip_special_tokens=True)
        assert chat.messages == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": first},
        ]
        steps = len(sessions.opened[0].sent)
        assert [piece async for piece in chat.say("And?", max_new_tokens=3)]
        assert sessions.opened[0].sent[steps][0] < len(prompt), "what was there is not sent again"
    assert [session.closed for session in sessions.opened] == [True]


async def test_an_answer_that_was_left_stays_as_far_as_it_came(model, sessions):
    async with model.chat() as chat:
        async for piece in chat.say("Hi", max_new_tokens=30):
            heard = piece
            break
        assert [piece async for piece in chat.say("Go on", max_new_tokens=3)]
        assert [m["content"] for m in chat.messages[:3]] == ["Hi", heard, "Go on"]
        assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert len(sessions.opened) == 1


async def test_a_turn_that_failed_is_forgotten(model, sessions):
    async with model.chat() as chat:
        with pytest.raises(InputError):
            await anext(chat.say("Hi", temperature=-1))
        assert chat.messages == []


async def test_a_lost_session_is_replaced_in_the_next_turn(model, sessions):
    async def gone() -> None:
        raise PeerUnreachableError("the server is gone")

    async with model.chat() as chat:
        sessions.stepped = gone
        with pytest.raises(PeerUnreachableError):
            await anext(chat.say("Hi"))
        sessions.stepped = None
        assert [piece async for piece in chat.say("Hi", max_new_tokens=3)]
        assert [session.closed for session in sessions.opened] == [True, False]

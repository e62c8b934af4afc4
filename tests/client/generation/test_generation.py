"""Generation over a session that runs the plain model's blocks: the same tokens, and all around them."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing

import pytest
import torch

from swarmcore.errors import InputError, InternalError, SessionLostError

PROMPTS = ["The sea", "a", "Once upon a time there was", "Ünïcödé 日本"]


async def tokens_of(generation) -> list[int]:
    await generation
    return generation.tokens


async def test_greedy_equals_transformers(model, plain_tokens):
    for prompt in PROMPTS:
        generation = model.generate(prompt, max_new_tokens=12)
        text = await generation
        expected = plain_tokens(prompt, 12)
        assert generation.tokens == expected
        assert text == model.tokenizer.decode(expected, skip_special_tokens=True)
        assert generation.prompt_tokens == len(model.tokenizer(prompt)["input_ids"])


async def test_temperature_zero_is_greedy(model, plain_tokens):
    generation = model.generate("The sea", max_new_tokens=8, temperature=0, top_p=0.9, seed=3)
    assert await tokens_of(generation) == plain_tokens("The sea", 8)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
)
async def test_penalties_equal_transformers(model, plain_tokens, options):
    generation = model.generate("abcabcabc", max_new_tokens=24, **options)
    assert await tokens_of(generation) == plain_tokens("abcabcabc", 24, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
async def test_seeded_sampling_equals_transformers(model, plain_tokens, options):
    generation = model.generate("The sea", max_new_tokens=16, seed=7, **options)
    assert await tokens_of(generation) == plain_tokens("The sea", 16, seed=7, **options)


async def test_the_models_own_penalty_is_the_default(model, plain_tokens):
    model.generation_config.repetition_penalty = 1.5
    expected = plain_tokens("abab", 16, repetition_penalty=1.5)
    assert await tokens_of(model.generate("abab", max_new_tokens=16)) == expected
    off = await tokens_of(model.generate("abab", max_new_tokens=16, repetition_penalty=1.0))
    assert off == plain_tokens("abab", 16) != expected


async def test_a_batch_gives_each_prompt_its_own_result(model, plain_tokens, sessions):
    generation = model.generate_batch(PROMPTS, max_new_tokens=10, speculation="off")
    texts = await generation
    assert generation.tokens == [plain_tokens(prompt, 10) for prompt in PROMPTS]
    assert texts == [model.tokenizer.decode(t, skip_special_tokens=True) for t in generation.tokens]
    assert len(sessions.opened) == 1
    assert sessions.opened[0].sent[0] == tuple(generation.prompt_tokens)
    assert sessions.opened[0].sent[1:] == [(1, 1, 1, 1)] * 9


async def test_a_batch_is_sampled_as_each_prompt_alone(model):
    options = {"max_new_tokens": 12, "temperature": 1.2}
    batch = model.generate_batch(PROMPTS, seed=100, **options)
    await batch
    alone = [await tokens_of(model.generate(p, seed=100 + i, **options)) for i, p in enumerate(PROMPTS)]
    assert batch.tokens == alone


async def test_a_sequence_that_ended_is_left_alone(model, plain_tokens, sessions):
    expected = [plain_tokens(prompt, 8) for prompt in PROMPTS]
    # The first prompt's second token now ends a text; no other sequence is to come to it as early.
    end = expected[0][1]
    model.generation_config.eos_token_id = [256, end]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in expected]
    batch = model.generate_batch(PROMPTS, max_new_tokens=8, speculation="off")
    texts = await batch
    assert batch.tokens == cut
    assert batch.finish_reasons[0] == "eos"
    assert texts[0] == model.tokenizer.decode(cut[0][:-1]), "the token that ends a text is no text"
    lengths = sessions.opened[0].sent[1:]
    assert [sum(step[i] for step in lengths) + 1 for i in range(4)] == [len(tokens) for tokens in cut]


async def test_pieces_arrive_as_they_are_made(model):
    generation = model.generate("The sea", max_new_tokens=20)
    seen = []
    async for piece in generation:
        seen.append((piece, generation.new_tokens))
    assert len(seen) > 5
    counts = [count for _, count in seen]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


async def test_a_stop_string_ends_the_text_and_is_not_said(model, plain_tokens):
    whole = model.tokenizer.decode(plain_tokens("The sea", 30), errors="replace")
    stop = whole[8:11]
    generation = model.generate("The sea", max_new_tokens=30, stop=["never said", stop])
    text = await generation
    assert text == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.new_tokens < 30


async def test_finish_reasons_and_figures(model, plain_tokens):
    generation = model.generate("The sea", max_new_tokens=5)
    assert generation.finish_reason is None
    assert generation.tokens == []
    assert "not started" in repr(generation)
    await generation
    assert generation.finish_reason == "length"
    assert generation.new_tokens == 5
    assert 0 < (generation.first_token_seconds or 0) <= generation.seconds
    assert "5 tokens" in repr(generation)
    model.generation_config.eos_token_id = plain_tokens("The sea", 1)[0]
    ended = model.generate("The sea", max_new_tokens=5)
    assert await ended == ""
    assert ended.finish_reason == "eos"


async def test_it_ends_at_the_models_limit(model, sessions):
    generation = model.generate([65] * 250, max_new_tokens=100)
    await generation
    assert generation.new_tokens == 6
    assert generation.finish_reason == "length"
    with pytest.raises(InputError, match="256"):
        await model.generate([65] * 256)


async def test_chat_messages_go_through_the_template(model, plain_tokens):
    messages = [{"role": "user", "content": "Hi"}]
    expected = plain_tokens("<user>Hi\n<assistant>", 8)
    assert await tokens_of(model.generate(messages, max_new_tokens=8)) == expected
    without = plain_tokens("<user>Hi\n", 8)
    options = {"add_generation_prompt": False}
    assert (
        await tokens_of(model.generate(messages, max_new_tokens=8, chat_template_kwargs=options)) == without
    )


async def test_token_ids_are_a_prompt(model, plain_tokens):
    assert await tokens_of(model.generate([65, 66, 67], max_new_tokens=6)) == plain_tokens([65, 66, 67], 6)


async def test_chat_without_a_template_says_so(model):
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        await model.generate([{"role": "user", "content": "Hi"}])


async def test_a_templates_own_complaint_is_passed_on(model):
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        await model.generate([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ([5, 400], "0 to 256"),
        ([-1], "0 to 256"),
        (["text"], "a prompt is"),
        ({"role": "user"}, "a prompt is"),
    ],
)
async def test_prompts_that_do_not_work(model, sessions, prompt, says):
    with pytest.raises(InputError, match=says):
        await model.generate(prompt)
    assert not sessions.opened


async def test_a_batch_is_a_list(model):
    with pytest.raises(InputError, match="list of prompts"):
        model.generate_batch("one")
    with pytest.raises(InputError, match="list of prompts"):
        model.generate_batch([])


async def test_a_second_turn_sends_only_what_is_new(model, plain_tokens, sessions):
    async with model.session() as session:
        first = model.generate("Hello there", max_new_tokens=6, session=session, speculation="off")
        await first
        # The last token was chosen, but nothing has asked yet what comes after it.
        assert session.positions == (first.prompt_tokens + 5,)
        prompt = [*model.tokenizer("Hello there")["input_ids"], *first.tokens, *b"abc"]
        second = model.generate(prompt, max_new_tokens=6, session=session, speculation="off")
        await second
        assert second.tokens == plain_tokens(prompt, 6)
        assert sessions.opened[0].sent[6] == (1 + 3,)
    assert sessions.opened[0].closed


async def test_a_prompt_that_parts_ways_is_rolled_back_to_the_fork(model, plain_tokens, sessions):
    async with model.session() as session:
        await model.generate("Hello there", max_new_tokens=6, session=session, speculation="off")
        other = model.generate("Hello world", max_new_tokens=6, session=session, speculation="off")
        assert await tokens_of(other) == plain_tokens("Hello world", 6)
        assert sessions.opened[0].sent[6] == (len("world"),)
        again = model.generate("Hello", max_new_tokens=6, session=session, speculation="off")
        assert await tokens_of(again) == plain_tokens("Hello", 6)
        assert sessions.opened[0].sent[12] == (1,), "a shorter prompt sends its last token again"


async def test_a_session_must_have_a_sequence_for_each_prompt(model):
    async with model.session(sequences=2) as session:
        with pytest.raises(InputError, match="sequences=1"):
            model.generate("a", session=session)
        texts = await model.generate_batch(["a", "b"], max_new_tokens=2, session=session)
        assert len(texts) == 2


async def test_one_generation_at_a_time_in_a_session(model):
    async with model.session() as session, aclosing(model.generate("a", session=session)) as first:
        await anext(first)
        with pytest.raises(InputError, match="under way"):
            await model.generate("b", session=session)
        with pytest.raises(InputError, match="under way"):
            await session.step([[65]])


async def test_leaving_the_loop_closes_the_session(model, sessions):
    async for _ in model.generate("The sea", max_new_tokens=50):
        break
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert sessions.opened[0].closed
    assert len(sessions.opened[0].sent) < 10


async def test_aclose_waits_for_the_session_to_close(model, sessions):
    generation = model.generate("The sea", max_new_tokens=50)
    await anext(generation)
    await generation.aclose()
    assert sessions.opened[0].closed
    await generation.aclose()
    assert generation.finish_reason is None


async def test_cancelling_closes_the_session(model, sessions):
    entered = asyncio.Event()

    async def never() -> None:
        entered.set()
        await asyncio.Event().wait()

    sessions.stepped = never
    task = asyncio.create_task(tokens_of(model.generate("The sea")))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sessions.opened[0].closed


async def test_a_failing_step_closes_the_session_and_raises(model, sessions):
    async def fail() -> None:
        raise SessionLostError("the server is gone")

    sessions.stepped = fail
    with pytest.raises(SessionLostError, match="gone"):
        await model.generate("The sea")
    assert sessions.opened[0].closed


async def test_a_session_given_by_the_caller_stays_open(model, sessions):
    async with model.session() as session:
        async with model.generate("The sea", session=session) as generation:
            await anext(generation)
        assert not sessions.opened[0].closed
        await model.generate("The sea", max_new_tokens=2, session=session)


async def test_a_processor_of_the_callers_own(model):
    def only_a(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids.shape == (1, 2) or ids[0, -1] == 65
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([65]), 0.0)

    generation = model.generate("ab", max_new_tokens=70, logits_processors=[only_a])
    assert await tokens_of(generation) == [65] * 70


async def test_an_error_in_a_processor_hurts_its_own_generation_only(model, plain_tokens):
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("my own bug")

    good, bad = await asyncio.gather(
        tokens_of(model.generate("The sea", max_new_tokens=6)),
        tokens_of(model.generate("The sea", max_new_tokens=6, logits_processors=[broken])),
        return_exceptions=True,
    )
    assert good == plain_tokens("The sea", 6)
    assert isinstance(bad, InternalError)
    assert isinstance(bad.__cause__, ZeroDivisionError)


async def test_a_closed_model_says_so(model):
    await model.close()
    with pytest.raises(SessionLostError, match="closed"):
        await model.generate("The sea")


async def test_closing_the_model_closes_its_sessions(model, sessions):
    session = await model.session().open()
    assert "1 sessions" in repr(model)
    await model.close()
    assert sessions.opened[0].closed
    with pytest.raises(SessionLostError):
        await session.step([[65]])

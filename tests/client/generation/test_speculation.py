"""Drafted tokens are verified: whatever is drafted, the text is that of plain decoding."""

from __future__ import annotations

import random
import threading
from contextlib import aclosing

import pytest
from scripted_drafters import ScriptedSource
from tiny_swarm import served

import swarmcore
from swarmcore.client.speculation.guarded import WAIT
from swarmcore.client.speculation.speculator import Speculator
from swarmcore.errors import CacheFullError, InputError, RemoteFaultError
from swarmcore.generation_settings import Speculation

TOKENS = 24
SETTINGS = ["auto", Speculation(length=4, depth=1), Speculation(length=3, depth=4), Speculation(length=0)]
OPTIONS = [
    {},
    {"temperature": 1.1, "top_k": 0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 3},
]


@pytest.fixture(scope="module")
def tight(llama_folder):
    """The address of a server with room for 64 tokens."""
    with served(llama_folder, "0:3", cache_tokens=64) as [server]:
        yield str(server.node.addresses[0])


def draft_with(model, expected, mood: str) -> None:
    """Have the next tokens of ``expected`` drafted, right or wrong."""
    rng = random.Random(5)

    def script(text: list[int], k: int) -> list[int]:
        right = expected[len(text) : len(text) + k]
        wrong = [(token + 1) % 257 for token in right]
        if mood == "mixed":
            right = [rng.choice(pair) for pair in zip(right, wrong, strict=True)][: rng.randrange(k + 1)]
        return wrong if mood == "wrong" else right

    model._speculator.close()
    sources = [ScriptedSource(script, threaded=False)]
    model._speculator = Speculator(model._compute.parts.vocab_size, sources)


@pytest.mark.parametrize("mood", ["right", "wrong", "mixed"])
@pytest.mark.parametrize("speculation", SETTINGS, ids=["auto", "chunks", "windows", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled", "penalties"])
async def test_the_text_is_that_of_plain_decoding(model, sessions, mood, speculation, options) -> None:
    plain = model.generate("The sea", max_new_tokens=TOKENS, speculation="off", **options)
    await plain
    assert plain.speculation.acceptance is None
    assert sum(plain.speculation.drafted.values()) == 0
    prompt = model.tokenizer("The sea")["input_ids"]
    draft_with(model, [*prompt, *plain.tokens], mood)
    drafted = model.generate("The sea", max_new_tokens=TOKENS, speculation=speculation, **options)
    await drafted
    assert drafted.tokens == plain.tokens
    assert drafted.finish_reason == plain.finish_reason
    counts = drafted.speculation
    assert counts.tokens == len(plain.tokens)
    if speculation == SETTINGS[1] and mood == "right":
        assert counts.steps < TOKENS / 3
        assert counts.accepted["scripted"] == counts.drafted["scripted"] > TOKENS / 2
    if speculation == SETTINGS[2] and mood == "wrong":
        assert counts.recalled > 0
        assert counts.steps <= TOKENS


@pytest.mark.parametrize("speculation", SETTINGS[:3], ids=["auto", "chunks", "windows"])
async def test_each_text_of_a_batch_has_its_own_accepted_length(model, speculation) -> None:
    prompts = ["The sea", "a", "abcabcabcabc"]
    plain = model.generate_batch(prompts, max_new_tokens=TOKENS, speculation="off")
    await plain
    drafted = model.generate_batch(prompts, max_new_tokens=TOKENS, speculation=speculation)
    await drafted
    assert drafted.tokens == plain.tokens


async def test_texts_of_a_batch_are_drafted_for_in_one_pass(model) -> None:
    source = ScriptedSource(lambda text, k: [65] * k)
    model._speculator.close()
    model._speculator = Speculator(model._compute.parts.vocab_size, [source])
    prompts = ["The sea", "a", "xyz"]
    await model.generate_batch(prompts, max_new_tokens=4, speculation=Speculation(length=2))
    assert max(source.batches) == len(prompts)


@pytest.mark.parametrize("speculation", SETTINGS[:3], ids=["auto", "chunks", "windows"])
async def test_a_session_goes_on_behind_what_is_certain(model, plain_tokens, speculation) -> None:
    prompt, tokens = "The sea", [*model.tokenizer("The sea")["input_ids"]]
    draft_with(model, [*tokens, *plain_tokens(prompt, 8), *[9] * 40], "right")
    async with model.session() as session:
        generation = model.generate(prompt, max_new_tokens=8, session=session, speculation=speculation)
        await generation
        assert session.tokens == ((*tokens, *generation.tokens[:-1]),)
        again = [*tokens, *generation.tokens, 65, 66]
        second = model.generate(again, max_new_tokens=8, session=session, speculation=speculation)
        await second
        assert second.tokens == plain_tokens(again, 8)


async def test_a_text_ends_where_it_ends_in_the_middle_of_drafts(model, plain_tokens) -> None:
    expected = plain_tokens("The sea", TOKENS)
    end = next(token for place, token in enumerate(expected) if place > 4 and token not in expected[:place])
    draft_with(model, [*model.tokenizer("The sea")["input_ids"], *expected], "right")
    model.generation_config.eos_token_id = [end]
    generation = model.generate("The sea", max_new_tokens=TOKENS, speculation=Speculation(length=16))
    await generation
    assert generation.tokens == expected[: expected.index(end) + 1]
    assert generation.finish_reason == "eos"


async def test_leaving_in_the_middle_of_a_window_leaves_the_session_in_order(model, plain_tokens) -> None:
    expected = plain_tokens("The sea", TOKENS)
    draft_with(model, [*model.tokenizer("The sea")["input_ids"], *expected], "right")
    windows = Speculation(length=2, depth=4)
    async with model.session() as session:
        async with aclosing(
            model.generate("The sea", max_new_tokens=TOKENS, session=session, speculation=windows)
        ) as pieces:
            await anext(pieces)
            await anext(pieces)
        whole = model.generate("The sea", max_new_tokens=TOKENS, session=session, speculation=windows)
        await whole
        assert whole.tokens == expected


def _raises(text: list[int], k: int) -> list[int]:
    raise RuntimeError("no idea")


FAULTS = {
    "RuntimeError: no idea": _raises,
    "5 tokens and 0 probabilities, where 4 were asked for": lambda text, k: [1] * (k + 1),
    "token 257 is not in the vocabulary of 257": lambda text, k: [257],
}


@pytest.mark.parametrize("threaded", [False, True], ids=["inline", "threaded"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_drafters_that_fail_are_counted_and_done_without(
    model, plain_tokens, caplog, fault, threaded
) -> None:
    model._speculator.close()
    sources = [ScriptedSource(FAULTS[fault], threaded=threaded)]
    model._speculator = Speculator(model._compute.parts.vocab_size, sources)
    generation = model.generate("The sea", max_new_tokens=8, speculation=Speculation(length=4, max_tokens=4))
    await generation
    assert generation.tokens == plain_tokens("The sea", 8)
    assert generation.speculation.set_aside == {"scripted": fault}
    assert f"scripted was set aside: {fault}" in str(generation.speculation)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_a_drafter_that_never_answers_is_late_once_for_each_proposal(model, plain_tokens) -> None:
    release = threading.Event()
    model._speculator.close()
    source = ScriptedSource(lambda text, k: [1] if release.wait(60) else [])
    model._speculator = Speculator(model._compute.parts.vocab_size, [source])
    generation = model.generate("The sea", max_new_tokens=8, speculation=Speculation(length=1))
    await generation
    release.set()
    assert generation.tokens == plain_tokens("The sea", 8)
    assert generation.speculation.late["scripted"] > 1
    assert generation.speculation.drafted["scripted"] == 0
    assert generation.seconds < 4 * WAIT, "it is waited for once"


@pytest.mark.parametrize("mood", ["right", "mixed"])
@pytest.mark.parametrize("speculation", SETTINGS[1:3], ids=["chunks", "windows"])
async def test_a_full_cache_ends_a_text_where_it_would_end_without_drafts(
    tight, llama_folder, mood, speculation
) -> None:
    async with swarmcore.connect(tight) as swarm:
        model = await swarm.load_model(str(llama_folder), dtype="float32", threads=1)
        plain = model.generate("The sea", max_new_tokens=200, min_new_tokens=200, speculation="off")
        with pytest.raises(CacheFullError):
            await plain
        assert len(plain.tokens) > 50
        draft_with(model, [*model.tokenizer("The sea")["input_ids"], *plain.tokens, *[9] * 99], mood)
        drafted = model.generate("The sea", max_new_tokens=200, min_new_tokens=200, speculation=speculation)
        with pytest.raises(CacheFullError):
            await drafted
        assert drafted.tokens == plain.tokens
        assert drafted.speculation.refused > 0
        assert "no room for more drafts" in str(drafted.speculation)


@pytest.mark.parametrize("mood", ["right", "wrong"])
async def test_servers_that_cannot_be_called_back_have_one_step_at_a_time(
    model, sessions, plain_tokens, mood
) -> None:
    sessions.max_in_flight = 1
    expected = plain_tokens("The sea", TOKENS)
    draft_with(model, [*model.tokenizer("The sea")["input_ids"], *expected], mood)
    generation = model.generate("The sea", max_new_tokens=TOKENS, speculation=SETTINGS[2])
    await generation
    assert generation.tokens == expected
    assert generation.speculation.recalled == 0 < generation.speculation.drafted["scripted"]


async def test_what_fails_under_drafts_fails_the_generation(model, sessions) -> None:
    async def fail() -> None:
        if len(sessions.opened[-1].sent) == 4:
            raise RemoteFaultError("the server is out of order")

    sessions.stepped = fail
    with pytest.raises(RemoteFaultError, match="out of order"):
        await model.generate("abcabcabc", max_new_tokens=TOKENS, speculation=Speculation(length=2, depth=3))


@pytest.mark.parametrize("speculation", ["on", 3, True, {"length": 2}])
async def test_what_is_no_speculation_is_refused(model, speculation) -> None:
    with pytest.raises(InputError, match="speculation must be auto, off, or a Speculation"):
        model.generate("a", speculation=speculation)

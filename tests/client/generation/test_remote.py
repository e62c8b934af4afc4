"""Texts for a client without torch: generation servers fail, are busy, come and go. In virtual time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import attrs
import numpy as np
import pytest
from head_swarm import COUNTING, CountingText, counted, head_swarm, said

from swarmcore.client.generation.remote import GenerationServerChoice
from swarmcore.errors import (
    BusyError,
    ConnectionLostError,
    InputError,
    MissingBlocksError,
    MissingHeadError,
    PeerUnreachableError,
    StreamClosedError,
    UnavailableError,
)
from swarmcore.generation_settings import GenerationSettings, open_generation
from swarmcore.head.queue import GenerationLimits
from swarmcore.registry.base import SwarmView
from swarmcore.resources import Resource
from swarmcore.types import ModelInfo, PeerId, ServerInfo
from swarmcore.wire.generate import AHEAD, ChatMessage

pytestmark = pytest.mark.virtual_time


async def test_a_text_and_how_it_went() -> None:
    async with head_swarm(CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=5)
        assert "not started" in repr(generation)
        assert (generation.seconds, generation.first_token_seconds) == (0.0, None)
        pieces = [piece async for piece in generation]
        assert pieces == [said([token]) for token in counted("ab", 5)]
        assert generation.tokens == counted("ab", 5)
        assert (generation.prompt_tokens, generation.new_tokens) == (2, 5)
        assert generation.finish_reason == "length"
        assert generation.server == swarm.heads[0].node.peer
        assert generation.first_token_seconds == pytest.approx(0.1, abs=0.01)
        assert generation.seconds == pytest.approx(0.5, abs=0.01)
        assert generation.failovers == 0
        assert await swarm.client.generate("ab", max_new_tokens=5) == "".join(pieces)


async def test_leaving_the_loop_ends_the_text() -> None:
    async with head_swarm(CountingText()) as swarm:
        async with swarm.client.generate("ab") as generation:
            async for _ in generation:
                if generation.new_tokens == 3:
                    break
        await asyncio.sleep(1)
        assert swarm.heads[0].model.under_way == 0
        assert generation.finish_reason is None
        assert swarm.heads[0].node.resources.used(Resource.STREAMS) == 0


async def test_a_text_goes_no_further_than_it_is_read() -> None:
    async with (
        head_swarm(CountingText(seconds=0.01)) as swarm,
        swarm.client.generate("ab", max_new_tokens=1000) as generation,
    ):
        async for _ in generation:
            if generation.new_tokens == 40:
                await asyncio.sleep(20)
                assert 40 < swarm.heads[0].model.made <= 40 + AHEAD + 1
                break


async def test_a_reader_that_comes_back_late_finds_the_rest() -> None:
    async with head_swarm(CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=200)
        pieces = [await anext(generation) for _ in range(20)]
        await asyncio.sleep(100)
        assert swarm.heads[0].model.under_way == 0
        pieces += [piece async for piece in generation]
        assert "".join(pieces) == said(counted("ab", 200))


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.15, 0.5, 0.95])
async def test_another_generation_server_goes_on_when_one_dies(moment: float) -> None:
    async with head_swarm(CountingText(), CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=10)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(moment)
        (dying,) = [h for h in swarm.heads if h.node.peer == generation.server] or swarm.heads[:1]
        await dying.kill()
        assert await text == said(counted("ab", 10))
        assert generation.tokens == counted("ab", 10)
        assert sum(head.model.made for head in swarm.heads) <= 12, "what was there was not made again"
        assert (generation.failovers == 1) == (moment > 0.1)
        if moment:
            assert dying.node.peer in swarm.client.health.banned(asyncio.get_running_loop().time())


async def _whole(generation: Any) -> str:
    return str(await generation)


async def test_tokens_without_text_are_not_lost_either() -> None:
    async with head_swarm(CountingText(silent=3), CountingText(silent=3)) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=9)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(0.55)
        (dying,) = [head for head in swarm.heads if head.node.peer == generation.server]
        await dying.kill()
        assert await text == said(counted("ab", 9))
        assert dying.model.made == 5


async def test_a_generation_server_that_comes_back_goes_on() -> None:
    async with head_swarm(CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=10)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(0.55)
        await swarm.heads[0].kill()
        await swarm.heads[0].registry.withdraw()
        await asyncio.sleep(30)
        assert not text.done()
        await swarm.add()
        began = asyncio.get_running_loop().time()
        assert await text == said(counted("ab", 10))
        assert asyncio.get_running_loop().time() - began < 1, "it was noticed at once"


async def test_patience_ends() -> None:
    async with head_swarm(CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=10, patience=20.0)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(0.55)
        await swarm.heads[0].kill()
        began = asyncio.get_running_loop().time()
        with pytest.raises((ConnectionLostError, PeerUnreachableError)):
            await text
        assert 19 < asyncio.get_running_loop().time() - began < 22
        assert generation.new_tokens == 5, "what came is there"


async def test_closing_the_swarm_ends_its_texts() -> None:
    async with head_swarm(CountingText()) as swarm:
        other = await swarm.another_client()
        text = asyncio.ensure_future(_whole(other.generate("ab", max_new_tokens=100)))
        await asyncio.sleep(0.55)
        began = asyncio.get_running_loop().time()
        await other.close()
        with pytest.raises(StreamClosedError):
            await text
        assert asyncio.get_running_loop().time() - began <= 1.01, "not all of its patience"


async def test_before_there_is_text_each_is_tried_once() -> None:
    broken = [CountingText(error=MissingBlocksError("gone", ranges=["0:2"])) for _ in range(3)]
    async with head_swarm(*broken) as swarm:
        with pytest.raises(MissingBlocksError) as missing:
            await swarm.client.generate("ab")
        assert missing.value.ranges == ["0:2"]
        assert missing.value.origin in [head.node.peer for head in swarm.heads]
        assert [head.service.counters["texts"] for head in swarm.heads] == [1, 1, 1]
        assert not swarm.client.health.banned(asyncio.get_running_loop().time()), "they only told bad news"


async def test_a_generation_server_that_fails_is_avoided() -> None:
    async with head_swarm(CountingText(error=RuntimeError("bug"), error_after=2), CountingText()) as swarm:
        for _ in range(6):
            assert await swarm.client.generate("ab", max_new_tokens=4) == said(counted("ab", 4))
        assert swarm.heads[0].service.counters["texts"] <= 1


async def test_a_busy_generation_server_is_passed_over_and_when_all_are_they_say_so() -> None:
    async with head_swarm(
        CountingText(), CountingText(), limits=GenerationLimits(at_once=1, waiting=1)
    ) as swarm:
        others = [await swarm.another_client() for _ in range(4)]
        running = [asyncio.ensure_future(_whole(other.generate("ab"))) for other in others]
        await asyncio.sleep(1)
        assert [head.service.queue.queued for head in swarm.heads] == [1, 1]
        with pytest.raises(BusyError) as busy:
            await swarm.client.generate("ab")
        assert busy.value.retry_after > 0
        await asyncio.gather(*running)


async def test_a_limit_of_one_is_not_that_of_another() -> None:
    async with head_swarm(CountingText(), limits=GenerationLimits(new_tokens=10)) as swarm:
        await swarm.add(limits=GenerationLimits(new_tokens=50))
        for _ in range(4):
            assert len((await swarm.client.generate("ab", max_new_tokens=50)).split()) == 50
        with pytest.raises(UnavailableError, match="more than this generation server makes"):
            await swarm.client.generate("ab", max_new_tokens=51)


async def test_what_cannot_work_anywhere_is_asked_once() -> None:
    async with head_swarm(CountingText(), CountingText()) as swarm:
        with pytest.raises(InputError, match="adapter: a name has 64 characters at most"):
            await swarm.client.generate("ab", adapter="x" * 65)
        assert sum(head.node.counters["calls_in"] for head in swarm.heads) == 1


async def test_nobody_makes_texts() -> None:
    async with head_swarm() as swarm:
        with pytest.raises(MissingHeadError, match="--serve-head"):
            await swarm.client.generate("ab")
        with pytest.raises(MissingHeadError, match="--serve-head"):
            swarm.client.generation_model()
        await swarm.add()
        with pytest.raises(MissingHeadError, match="texts of another"):
            await swarm.client.generate("ab", model="another")
        for model in ("", COUNTING.name, COUNTING.fingerprint):
            assert swarm.client.generation_model(model).fingerprint == COUNTING.fingerprint
            assert await swarm.client.generate("ab", model=model, max_new_tokens=1)


async def test_one_that_leaves_sends_its_clients_on() -> None:
    async with head_swarm(CountingText(), CountingText()) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=10)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(0.55)
        (leaving,) = [head for head in swarm.heads if head.node.peer == generation.server]
        await leaving.service.close()
        assert await text == said(counted("ab", 10))
        assert generation.failovers == 1
        await leaving.announce(state="draining")
        for _ in range(4):
            assert await swarm.client.generate("ab", max_new_tokens=1)
        assert leaving.service.counters["texts"] == 1


async def test_a_seed_is_made_up_and_kept() -> None:
    async with head_swarm(CountingText(), CountingText()) as swarm:
        generation = swarm.client.generate("ab", temperature=1.0, max_new_tokens=10)
        text = asyncio.ensure_future(_whole(generation))
        await asyncio.sleep(0.55)
        (dying,) = [head for head in swarm.heads if head.node.peer == generation.server]
        await dying.kill()
        await text
        first = generation.tokens[0]
        assert generation.tokens == [(first + 7 * place) % 250 for place in range(10)]


def server(peer: str, *heads: ModelInfo, state: str = "online") -> ServerInfo:
    return ServerInfo(PeerId(peer), (), heads=heads, state=state)  # type: ignore[arg-type]


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView({server.peer: server for server in servers})


def picked(choice: GenerationServerChoice, *servers: ServerInfo, **without: Any) -> set[str]:
    found = (choice.pick(view(*servers), **without) for _ in range(50))
    return {server.peer for server in found if server is not None}


OTHER = attrs.evolve(COUNTING, fingerprint="d1" * 32)


def test_which_generation_server_is_picked() -> None:
    a, b, c = server("a", COUNTING), server("b", COUNTING), server("c")
    leaving = server("d", COUNTING, state="draining")
    choice = GenerationServerChoice("", random.Random(1))
    assert picked(choice, a, b, c, leaving) == {"a", "b"}
    assert choice.model == COUNTING.fingerprint, "from now on it is this one"
    assert picked(choice, a, b, c, leaving, tried={"a"}) == {"b"}
    assert picked(choice, a, b, c, leaving, banned={"a", "b"}) == {"d"}
    assert picked(choice, a, banned={"a"}) == {"a"}
    assert picked(choice, server("e", OTHER)) == set()
    assert picked(GenerationServerChoice("", random.Random(1), admits=lambda peer: peer != "a"), a, b) == {
        "b"
    }


def test_models_that_have_to_be_told_apart() -> None:
    servers = server("a", COUNTING), server("b", OTHER, COUNTING)
    for unclear in ("", "counting"):
        with pytest.raises(InputError, match=r"counting \(c0c0c0c0c0c0\), counting \(d1d1d1d1d1d1\)"):
            picked(GenerationServerChoice(unclear, random.Random(1)), *servers)
    assert picked(GenerationServerChoice(OTHER.fingerprint, random.Random(1)), *servers) == {"b"}


def request(prompt: Any, **options: Any) -> Any:
    return open_generation(prompt, GenerationSettings(**options), rng=random.Random(1))


def test_what_is_asked_for() -> None:
    assert request("Hi").text == "Hi"
    assert request([1, 2]).tokens == (1, 2)
    assert request([{"role": "user", "content": "Hi"}]).messages == (ChatMessage("user", "Hi"),)
    assert request("Hi", stop="x").stop == ("x",)
    assert request("Hi").seed is None
    assert request("Hi", temperature=0.0).seed is None
    assert request("Hi", temperature=1.0, seed=3).seed == 3
    assert request("Hi", temperature=1.0).seed > 0
    assert request("").text == ""
    assert request(np.array([[1, 2]])).tokens == (1, 2)
    assert (request("Hi").max_new_tokens, request("Hi").default_length) == (256, True)
    assert not request("Hi", max_new_tokens=256).default_length


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "the prompt is empty"),
        ([-1], {}, "token ids must be"),
        ([2**40], {}, "token ids must be"),
        (b"Hi", {}, "a prompt is"),
        (["Hi"], {}, "a prompt is"),
        ([True], {}, "a prompt is"),
        ({"role": "user", "content": "Hi"}, {}, "a prompt is"),
        (None, {}, "a prompt is"),
        ([{"role": "user"}], {}, "a prompt is"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "a role and a content"),
        ([{"role": "user", "content": "Hi", "name": "Ann"}], {}, "a role and a content"),
        ("\ud800", {}, "prompt has half a character"),
        ([{"role": "user", "content": "\ud800"}], {}, "content has half a character"),
        ("Hi", {"stop": "\ud800"}, "stop has half a character"),
        ("Hi", {"stop": ["x"] * 17}, "stop: a generation server takes 16"),
        ("Hi", {"stop": "x" * 257}, "stop: .* 256 characters"),
        ("Hi", {"no_repeat_ngram_size": 65}, "no_repeat_ngram_size must be"),
        ("Hi", {"logits_processors": [print]}, "logits_processors"),
        ("Hi", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_asked_for(prompt: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        request(prompt, **options)


async def test_settings_are_checked_before_anything_is_sent() -> None:
    async with head_swarm(CountingText()) as swarm:
        with pytest.raises(InputError, match="max_new_tokens must be"):
            swarm.client.generate("ab", max_new_tokens=0)
        assert swarm.heads[0].node.counters["calls_in"] == 0

"""A generation server and what clients may do to it: in virtual time, with a text model that counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from head_swarm import CountingText, HeadSwarm, counted, head_swarm, said

from swarmcore.client.generation.stream import TextStream
from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.errors import (
    BusyError,
    DeadlineExceededError,
    InputError,
    ProtocolError,
    RemoteFaultError,
    ServerDrainingError,
    StreamClosedError,
    SwarmError,
    UnavailableError,
)
from swarmcore.head.queue import GenerationLimits
from swarmcore.rpc.channel import Channel
from swarmcore.types import Numerics
from swarmcore.wire.generate import (
    AHEAD,
    ChatMessage,
    GenerationEnded,
    GenerationStarted,
    OpenGeneration,
    TextPiece,
    TokensTaken,
)
from swarmcore.wire.protocols import GENERATE_PROTOCOL

pytestmark = pytest.mark.virtual_time


async def ask(swarm: HeadSwarm, request: OpenGeneration) -> Channel:
    return await swarm.client.node.open(swarm.heads[0].node.addresses[0], GENERATE_PROTOCOL, request)


async def records(channel: Channel) -> list[Any]:
    """What comes, to the end."""
    found = []
    async with channel:
        try:
            while True:
                found.append((await channel.receive()).record)
        except StreamClosedError:
            return found


async def test_what_goes_over_the_wire() -> None:
    async with head_swarm(CountingText(silent=2)) as swarm:
        start, *pieces, end = await records(await ask(swarm, OpenGeneration(text="ab", max_new_tokens=5)))
        tokens = counted("ab", 5)
        assert start == GenerationStarted("c0" * 32, 2)
        assert pieces == [
            TextPiece(said(tokens[:2]), tuple(tokens[:2])),
            TextPiece(said(tokens[2:4]), tuple(tokens[2:4])),
        ]
        assert end == GenerationEnded("length", tuple(tokens[4:]), 5, pytest.approx(0.5))
        assert swarm.heads[0].service.counters == {"texts": 1, "text_tokens": 4}


async def test_each_client_has_a_namespace_of_its_own() -> None:
    async with head_swarm(CountingText()) as swarm:
        await records(await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1)))
        assert swarm.heads[0].model.namespaces == [swarm.client.node.peer]


async def test_its_note_says_what_drafts_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    async with head_swarm(CountingText()) as swarm:
        service = swarm.heads[0].service
        await records(await ask(swarm, OpenGeneration(text="ab", max_new_tokens=5)))
        assert service.note == "head: makes 0 texts for thin clients, 0 wait"
        counts = SpeculationCounts(2, 5, Counter(suffix=4), Counter(suffix=3))
        monkeypatch.setattr(TextStream, "speculation", counts)
        for _ in range(2):
            await records(await ask(swarm, OpenGeneration(text="ab", max_new_tokens=5)))
        assert service.note.endswith("; 2.50 tokens a step, 75% of drafts accepted (suffix 6/8)")


async def test_thin_clients_are_told_how_servers_compute() -> None:
    ways = (Numerics.parse("torch/bf16"), Numerics.parse("ggml/q4_k_m/f32/f16"))
    async with head_swarm(CountingText(numerics=ways)) as swarm:
        generation = swarm.client.generate("ab", max_new_tokens=5)
        assert generation.numerics == ()
        await generation
        assert generation.numerics == ways


async def test_it_goes_on_after_the_tokens_that_a_client_has() -> None:
    async with head_swarm(CountingText()) as swarm:
        tokens = counted("ab", 6)
        request = OpenGeneration(text="ab", max_new_tokens=6, so_far=tuple(tokens[:4]))
        _, *pieces, end = await records(await ask(swarm, request))
        assert [piece.tokens for piece in pieces] == [(tokens[4],), (tokens[5],)]
        assert end.new_tokens == 6


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"text": None}, InputError, "text, messages or tokens; got none"),
        ({"tokens": (1,)}, InputError, "got text and tokens"),
        ({"messages": (ChatMessage("user", "hi"),)}, InputError, "got text and messages"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens must be"),
        ({"max_new_tokens": 257}, UnavailableError, "max_new_tokens of 257 .* 256"),
        ({"temperature": -1.0}, InputError, "temperature must be"),
        ({"temperature": 1e9}, InputError, "temperature must be"),
        ({"temperature": float("nan")}, InputError, "temperature must be"),
        ({"top_p": 2.0, "temperature": 1.0}, InputError, "top_p must be"),
        ({"top_k": 5}, InputError, "top_k only matters"),
        ({"repetition_penalty": 0.0}, InputError, "repetition_penalty must be"),
        ({"no_repeat_ngram_size": 65}, InputError, "no_repeat_ngram_size must be"),
        ({"seed": -1}, InputError, "seed must be"),
        ({"stop": ("",)}, InputError, "stop must be"),
        ({"stop": ("x",) * 17}, InputError, "stop: a generation server takes 16"),
        ({"stop": ("x" * 257,)}, InputError, "stop: .* 256 characters"),
        ({"so_far": (1,) * 51, "max_new_tokens": 50}, InputError, "so_far has 51 tokens"),
        ({"adapter": "x" * 65}, InputError, "adapter: a name"),
        ({"model": "another"}, UnavailableError, "model: .* not of 'another'"),
        ({"text": "x" * 21}, UnavailableError, "21 tokens, and this generation server takes 20"),
        ({"text": "x" * 641}, UnavailableError, "text: 641 characters"),
        ({"text": None, "tokens": (1,) * 21}, UnavailableError, "21 tokens"),
    ],
)
async def test_what_it_does_not_take(fields: dict[str, Any], error: type[SwarmError], says: str) -> None:
    async with head_swarm(CountingText(), limits=GenerationLimits(prompt_tokens=20, new_tokens=256)) as swarm:
        with pytest.raises(error, match=says) as refused:
            await records(await ask(swarm, OpenGeneration(**{"text": "ab", **fields})))
        assert type(refused.value) is error
        assert swarm.heads[0].model.made == 0
        assert await records(await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1)))


async def test_a_setting_of_the_wrong_type_is_named() -> None:
    async with head_swarm(CountingText()) as swarm:
        request = OpenGeneration(text="ab", max_new_tokens="many")  # type: ignore[arg-type]
        with pytest.raises(ProtocolError, match="max_new_tokens"):
            await records(await ask(swarm, request))


async def test_no_more_at_once_than_allowed_and_the_rest_in_turn() -> None:
    limits = GenerationLimits(at_once=2, waiting=10)
    async with head_swarm(CountingText(), limits=limits) as swarm:
        other = await swarm.another_client()
        hog = [swarm.client.generate("ab", max_new_tokens=10) for _ in range(4)]
        began = asyncio.get_running_loop().time()
        hogging = [asyncio.ensure_future(_whole(each)) for each in hog]
        await asyncio.sleep(0.01)
        await other.generate("cd", max_new_tokens=10)
        assert asyncio.get_running_loop().time() - began < 1.1, "the place that is kept for others"
        await asyncio.gather(*hogging)
        assert swarm.heads[0].model.most_under_way == 2


async def _whole(generation: Any) -> str:
    return str(await generation)


async def test_a_line_that_is_full_and_a_turn_that_does_not_come() -> None:
    limits = GenerationLimits(at_once=1, waiting=2, queue_timeout=5.0)
    async with head_swarm(CountingText(), limits=limits) as swarm:
        long = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1000))
        assert (await long.receive()).kind == "GenerationStarted"
        waiting = await ask(swarm, OpenGeneration(text="ab"))
        await asyncio.sleep(0.1)
        with pytest.raises(BusyError, match="wait at this generation server") as full:
            await records(await ask(swarm, OpenGeneration(text="ab")))
        assert full.value.retry_after > 0
        with pytest.raises(BusyError, match="no turn came in 5 s") as late:
            await records(waiting)
        assert late.value.retry_after > 0
        assert swarm.heads[0].service.counters["texts_refused"] == 2
        long.abort("enough")


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_who_leaves_is_worked_for_no_longer(how: str) -> None:
    async with head_swarm(CountingText(), limits=GenerationLimits(at_once=1)) as swarm:
        model = swarm.heads[0].model
        channel = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1000))
        waiting = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1000))
        await asyncio.sleep(2.05)
        made = model.made
        if how == "close":
            await waiting.close()
            await channel.close()
        else:
            waiting.abort("enough")
            channel.abort("enough")
        await asyncio.sleep(5)
        assert model.made <= made + 1
        assert model.under_way == 0
        assert swarm.heads[0].service.queue.queued == 0


async def test_a_reader_that_stops_stops_the_text_and_loses_its_place_in_the_end() -> None:
    async with head_swarm(CountingText(seconds=0.01)) as swarm:
        model = swarm.heads[0].model
        channel = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1000))
        await asyncio.sleep(10)
        assert model.made == AHEAD + 1
        await channel.send(TokensTaken(30))
        await asyncio.sleep(10)
        assert model.made == AHEAD + 31
        await asyncio.sleep(60)
        assert model.under_way == 0
        with pytest.raises(DeadlineExceededError, match="took nothing of its text for 60 s"):
            await records(channel)


async def test_a_client_that_lies_about_what_it_took_hurts_nobody() -> None:
    async with head_swarm(CountingText(seconds=0.01)) as swarm:
        channel = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=200))
        for taken in (10**9, -5, 3):
            await channel.send(TokensTaken(taken))
        *_, end = await records(channel)
        assert end.new_tokens == 200


async def test_a_model_that_fails_says_no_more_than_that() -> None:
    broken = CountingText(error=RuntimeError("secret path"), error_after=3)
    async with head_swarm(broken) as swarm:
        with pytest.raises(RemoteFaultError) as failed:
            await records(await ask(swarm, OpenGeneration(text="ab")))
        assert "secret" not in str(failed.value)
        assert swarm.heads[0].service.queue.under_way == 0


async def test_a_generation_server_that_leaves_waits_a_while_and_sends_its_clients_on() -> None:
    async with head_swarm(CountingText()) as swarm:
        service = swarm.heads[0].service
        short = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=20))
        long = await ask(swarm, OpenGeneration(text="ab", max_new_tokens=1000))
        await asyncio.sleep(0.5)
        leaving = asyncio.ensure_future(service.drain(5.0))
        await asyncio.sleep(0.1)
        with pytest.raises(ServerDrainingError, match="takes no new texts"):
            await records(await ask(swarm, OpenGeneration(text="ab")))
        assert (await records(short))[-1].new_tokens == 20
        assert await leaving == 1
        await service.close()
        with pytest.raises(ServerDrainingError, match="another one can go on"):
            await records(long)

"""Real servers, real weights: the swarm says what plain Transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest

import swarmcore

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = [
    "The capital of France is",
    "Water boils",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    ",
]


async def test_three_servers_generate_what_plain_transformers_does(model, reference):
    pieces = [piece async for piece in model.generate(PROMPTS[0], max_new_tokens=32)]
    assert len(pieces) > 5, "text arrives as it is generated"
    assert "".join(pieces) == await reference.text(PROMPTS[0], 32)


async def test_a_batch_of_prompts_of_different_lengths(model, reference):
    texts = await model.generate_batch(PROMPTS, max_new_tokens=16)
    assert texts == [await reference.text(prompt, 16) for prompt in PROMPTS]


async def test_one_server_generates_the_same(serve, smollm2_folder: Path, reference):
    async with await serve(smollm2_folder, "0:30") as server, swarmcore.connect(server.address) as swarm:
        model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
        texts = await model.generate_batch(PROMPTS, max_new_tokens=16)
    assert texts == [await reference.text(prompt, 16) for prompt in PROMPTS]


async def test_a_long_prompt_goes_through_the_chain_in_chunks(model, reference):
    prompt = " ".join(f"{n} sheep," for n in range(200))
    text = "".join([piece async for piece in model.generate(prompt, max_new_tokens=8)])
    assert text == await reference.text(prompt, 8)


async def test_overlapping_servers_are_used_in_part(serve, smollm2_folder: Path, reference):
    async with (
        await serve(smollm2_folder, "0:17") as left,
        await serve(smollm2_folder, "12:30", "--bootstrap", left.address) as right,
        swarmcore.connect(right.address) as swarm,
    ):
        other = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1)
        chain = await swarm.wait_for_blocks(other.info, timeout=30)
        first, second = (stage.span for stage in chain.stages)
        assert (first.start, second.end) == (0, 30)
        assert 12 <= first.end == second.start <= 17
        text = "".join([piece async for piece in other.generate(PROMPTS[2], max_new_tokens=16)])
    assert text == await reference.text(PROMPTS[2], 16)


@pytest.mark.parametrize("codec", ["int8", "raw+zstd"])
async def test_hidden_states_travel_in_the_codec_of_the_clients_choice(
    swarm, smollm2_folder: Path, reference, codec
):
    options = swarmcore.SessionOptions(codec=codec)
    model = await swarm.load_model(str(smollm2_folder), dtype="float32", threads=1, session_options=options)
    text = await model.generate(PROMPTS[0], max_new_tokens=6)
    assert text == await reference.text(PROMPTS[0], 6)

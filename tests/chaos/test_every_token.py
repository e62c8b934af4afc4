"""kill -9 before every token, and while it is made: the text is that of plain Transformers."""

from __future__ import annotations

import asyncio
import random

import pytest
from kills import text_amid_kills

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once upon a time, in a village by the sea, there lived"
TOKENS = 20


async def test_a_server_is_killed_before_every_token(client, reference, delays):
    """Of one stage after the other; `tiny/test_every_token_of_every_stage` does the rest."""
    text = await text_amid_kills(client, PROMPT, TOKENS, delays("kill -9 to the next token"))
    assert text == await reference.text(PROMPT, TOKENS)
    assert len(client.failovers) >= TOKENS


@pytest.mark.parametrize("journal", ["client", "servers"], indirect=True)
async def test_servers_are_killed_while_a_token_is_made(client, fleet, reference, delays, journal):
    """At random moments of a step: while the step is on its way, is computed, or its output comes back."""
    chance = random.Random(f"{journal} 7")
    clock = asyncio.get_running_loop().time
    text, delays_of_steps = "", []
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        for position in range(TOKENS):
            if position % 4:
                began = clock()
                text += await anext(generation)
                delays_of_steps.append(clock() - began)
                continue
            stage = chance.randrange(3)
            await client.replicas_of(stage)
            victim = client.serving(session, stage)
            token = asyncio.create_task(anext(generation))
            await asyncio.sleep(chance.random() * min(delays_of_steps, default=0.1))
            fleet.kill(victim.peer)
            fleet.start_soon(victim.span)
            began = clock()
            text += await token
            delays(f"kill -9 within a step, journal of the {journal}").append(clock() - began)
    assert text == await reference.text(PROMPT, TOKENS)
    assert client.failovers

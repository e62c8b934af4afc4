"""The peer that everybody joined by is killed: those who are there go on, and others join by the rest."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "In-the-beginning"
TOKENS = 12


async def test_the_bootstrap_peer_is_killed(make_fleet, open_client, reference):
    async with make_fleet(replicas=1) as fleet, open_client(fleet) as client:
        async with client.model.session() as session:
            generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
            text = await anext(generation)
            await fleet.bootstrap.kill()
            text += await anext(generation)
            for stage in range(3):
                # A server that joins now, by another member, is found by a client that was there before.
                dead = fleet.kill(client.serving(session, stage).peer)
                await fleet.start(dead.span)
                text += await anext(generation)
            text += "".join([piece async for piece in generation])
        assert text == await reference.text(PROMPT, TOKENS)
        async with open_client(fleet) as late:
            assert await late.model.generate(PROMPT, max_new_tokens=TOKENS) == text

"""Servers that are told to leave while they are in use: nobody notices."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "A-good-guest-knows-when-to-leave."
TOKENS = 16


@pytest.mark.parametrize("journal", ["client", "servers"], indirect=True)
async def test_servers_leave_in_the_middle(client, fleet, reference, journal):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
        text = await anext(generation)
        for stage in (0, 1, 2):
            leaving = fleet.leave(client.serving(session, stage).peer)
            while leaving.process.returncode is None:
                text += await anext(generation)
            assert leaving.process.returncode == 0
            assert leaving.peer not in session.chain.peers
        text += "".join([piece async for piece in generation])
    assert text == await reference.text(PROMPT, TOKENS)
    assert {failover.how for failover in client.failovers} == {"handed over"}

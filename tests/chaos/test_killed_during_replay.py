"""The server that is just taking over is killed, too."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

LONG_PROMPT = " ".join(f"{number} sheep," for number in range(150))


@pytest.mark.parametrize(
    ("stage", "journal"), [(0, "client"), (1, "client"), (2, "servers")], indirect=["journal"]
)
async def test_the_one_that_takes_over_is_killed_during_the_replay(client, fleet, reference, stage, journal):
    """A replay of some hundred tokens takes long enough to be met in the middle."""
    async with client.model.session() as session:
        generation = client.model.generate(LONG_PROMPT, session=session, max_new_tokens=3)
        text = await anext(generation)
        first = client.serving(session, stage)
        await fleet.start(first.span)
        await client.replicas()
        others = [member for member in fleet.holding(first.span) if member is not first]
        fleet.kill(first.peer)
        going_on = asyncio.create_task(anext(generation))
        second = None
        while second is None:
            sessions = [(await client.swarm.info(member.peer)).server.sessions for member in others]
            second = next((m for m, count in zip(others, sessions, strict=True) if count), None)
        assert not going_on.done()
        fleet.kill(second.peer)
        text += await going_on
        text += "".join([piece async for piece in generation])
    assert text == await reference.text(LONG_PROMPT, 3)

"""More than one server falls: several together, and all that hold some blocks."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import MissingBlocksError

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Two-ways-to-cross-a-river:"
TOKENS = 12


@pytest.mark.parametrize(
    ("stages", "journal"),
    [((0, 1), "client"), ((0, 2), "client"), ((1, 2), "servers"), ((0, 1, 2), "servers")],
    indirect=["journal"],
)
async def test_servers_that_are_killed_together(client, fleet, reference, stages, journal):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
        text = await anext(generation)
        for victim in [client.serving(session, stage) for stage in stages]:
            fleet.kill(victim.peer)
        text += "".join([piece async for piece in generation])
    assert text == await reference.text(PROMPT, TOKENS)


async def test_blocks_that_nobody_holds_for_a_while(client, fleet, reference):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
        text = await anext(generation)
        span = client.serving(session, 1).span
        for member in fleet.holding(span):
            fleet.kill(member.peer)
        waiting = asyncio.create_task(anext(generation))
        done, _ = await asyncio.wait([waiting], timeout=1.5)
        assert not done
        await fleet.start(span)
        text += await waiting
        text += "".join([piece async for piece in generation])
    assert text == await reference.text(PROMPT, TOKENS)


async def test_blocks_that_nobody_holds_any_more(fleet, open_client):
    """The session says what is missing, and can go on once it is there."""
    async with open_client(fleet, patience=1.0) as client, client.model.session() as session:
        ids = client.model.tokenizer(PROMPT).input_ids
        logits = await session.step([ids])
        span = client.serving(session, 2).span
        for member in fleet.holding(span):
            fleet.kill(member.peer)
        with pytest.raises(MissingBlocksError, match="4:5"):
            await session.step([[1]])
        assert session.positions == (len(ids),)
        await fleet.start(span)
        await client.replicas()
        session.rollback(len(ids) - 1)
        again = await session.step([ids[-1:]])
        assert (again - logits).abs().max() < 1e-3

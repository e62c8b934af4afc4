"""More than one server falls: together, all that hold some blocks, or one that is just taking over."""

from __future__ import annotations

import asyncio

import pytest

from swarmcore.errors import MissingBlocksError

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "There are two ways to cross a river:"
LONG_PROMPT = " ".join(f"{number} sheep," for number in range(150))
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
        with pytest.raises(MissingBlocksError, match="20:30"):
            await session.step([[1]])
        assert session.positions == (len(ids),)
        await fleet.start(span)
        await client.replicas()
        session.rollback(len(ids) - 1)
        again = await session.step([ids[-1:]])
        assert (again - logits).abs().max() < 1e-3


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

"""Clients that go away in the middle: the servers have their caches back, and nothing of it runs on here.

What is left behind is counted by the fixture ``fleet``.
"""

from __future__ import annotations

import asyncio
import signal

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = " ".join(f"{number} goats," for number in range(150))


async def busy(client, fleet) -> None:
    """Wait until every stage has a session."""
    while sum([(await client.swarm.info(peer)).server.sessions for peer in fleet.members]) < 3:
        pass


@pytest.mark.parametrize("journal", ["client", "servers"], indirect=True)
async def test_a_client_that_is_cancelled_in_a_prompt(client, fleet, journal):
    text = asyncio.create_task(_whole(client))
    await busy(client, fleet)
    text.cancel()
    with pytest.raises(asyncio.CancelledError):
        await text


async def test_a_client_that_is_cancelled_while_it_decodes(client, fleet):
    generation = client.model.generate(PROMPT, max_new_tokens=100)
    await anext(generation)
    for delay in (0.0, 0.01, 0.03, 0.1):
        token = asyncio.create_task(anext(generation))
        await asyncio.wait([token], timeout=delay)
        if token.cancel():
            with pytest.raises(asyncio.CancelledError):
                await token
            break
    await generation.aclose()


@pytest.mark.parametrize("stage", range(3))
async def test_a_client_that_is_cancelled_during_a_failover(client, fleet, stage):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=100)
        await anext(generation)
        dead = fleet.kill(client.serving(session, stage).peer)
        (heir,) = fleet.holding(dead.span)
        token = asyncio.create_task(anext(generation))
        while not (await client.swarm.info(heir.peer)).server.sessions:
            pass
        token.cancel()
        with pytest.raises(asyncio.CancelledError):
            await token


async def test_a_client_that_is_cancelled_while_it_waits_for_a_server(client, fleet):
    async with client.model.session() as session:
        generation = client.model.generate("Nobody", session=session, max_new_tokens=100)
        await anext(generation)
        for member in fleet.holding(client.serving(session, 1).span):
            member.process.signal(signal.SIGSTOP)
            fleet.kill(member.peer)
        token = asyncio.create_task(anext(generation))
        done, _ = await asyncio.wait([token], timeout=1.0)
        assert not done
        token.cancel()
        with pytest.raises(asyncio.CancelledError):
            await token


async def _whole(client) -> str:
    text: str = await client.model.generate(PROMPT, max_new_tokens=100)
    return text

"""Servers that hang, come back, or come back with nothing in their caches."""

from __future__ import annotations

import asyncio
import signal

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "The-sea-was-calm"
TOKENS = 12


@pytest.mark.parametrize("stage", range(3))
async def test_a_server_that_hangs_is_replaced_and_is_of_use_when_it_wakes(client, fleet, reference, stage):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        text = await anext(generation)
        hanging = client.serving(session, stage)
        hanging.process.signal(signal.SIGSTOP)
        text += await anext(generation)
        assert hanging.peer not in session.chain.peers
        (other,) = [member for member in fleet.holding(hanging.span) if member is not hanging]
        assert other.peer in session.chain.peers
        hanging.process.signal(signal.SIGCONT)
        await client.replicas()
        # The one that took over falls, and there is nobody else.
        fleet.kill(other.peer)
        text += "".join([piece async for piece in generation])
        assert hanging.peer in session.chain.peers
    assert text == await reference.text(PROMPT, TOKENS)
    assert len(client.failovers) >= 2


async def test_a_server_that_hangs_for_a_moment_only_costs_that_moment(client, fleet, reference):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        text = await anext(generation)
        chain = session.chain.peers
        for stage in range(3):
            hanging = client.serving(session, stage)
            hanging.process.signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.3, hanging.process.signal, signal.SIGCONT)
            text += await anext(generation)
        text += "".join([piece async for piece in generation])
        assert session.chain.peers == chain
    assert text == await reference.text(PROMPT, TOKENS)
    assert not client.failovers


async def test_a_server_that_comes_back_under_its_name_has_an_empty_cache(client, fleet, reference, tmp_path):
    """The same peer id, at another address: its session is gone, and is opened there again."""
    span = fleet.spans[1]
    identity = ("--identity", str(tmp_path / "key"))
    for member in fleet.holding(span):
        fleet.kill(member.peer)
    first = await fleet.start(span, *identity)
    await client.replicas()
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        text = await anext(generation)
        assert client.serving(session, 1) is first
        fleet.kill(first.peer)
        second = await fleet.start(span, *identity)
        assert second.peer == first.peer
        text += "".join([piece async for piece in generation])
        assert client.serving(session, 1) is second
    assert text == await reference.text(PROMPT, TOKENS)
    assert len(client.failovers) >= 1

"""Servers over libp2p: the same text as plain Transformers, also when they are killed and when they hang."""

from __future__ import annotations

import asyncio
import signal

import pytest
import pytest_asyncio

pytest.importorskip("libp2p", reason="needs the extra libp2p")

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once upon a time, in a village by the sea, there lived"
TOKENS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def libp2p_fleet(make_fleet):
    async with make_fleet(replicas=2, transport="libp2p", listen="/ip4/127.0.0.1/tcp/0") as fleet:
        yield fleet


async def test_servers_are_killed_before_tokens_of_every_stage(libp2p_fleet, open_client, reference, delays):
    """kill -9 before every second token, at one stage after the other."""
    clock = asyncio.get_running_loop().time
    text = ""
    async with open_client(libp2p_fleet) as client, client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
        for position in range(TOKENS):
            if position % 2 == 0:
                stage = position // 2 % 3
                await client.replicas_of(stage)
                victim = client.serving(session, stage)
                libp2p_fleet.kill(victim.peer)
                libp2p_fleet.start_soon(victim.span)
                began = clock()
                text += await anext(generation)
                delays("libp2p: kill -9 to the next token").append(clock() - began)
            else:
                text += await anext(generation)
        assert text == await reference.text(PROMPT, TOKENS)
        assert len(client.failovers) >= TOKENS // 2


async def test_several_generate_at_once(libp2p_fleet, open_client, reference):
    async with open_client(libp2p_fleet) as client:
        texts = await client.model.generate_batch([PROMPT] * 2 + ["The sea was"], max_new_tokens=12)
    assert texts[0] == texts[1] == await reference.text(PROMPT, 12)
    assert texts[2] == await reference.text("The sea was", 12)


async def test_a_server_that_hangs_is_replaced(libp2p_fleet, open_client, reference):
    async with open_client(libp2p_fleet) as client, client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
        text = await anext(generation)
        hanging = client.serving(session, 1)
        hanging.process.signal(signal.SIGSTOP)
        try:
            text += "".join([piece async for piece in generation])
            assert hanging.peer not in session.chain.peers
        finally:
            hanging.process.signal(signal.SIGCONT)
        assert text == await reference.text(PROMPT, TOKENS)

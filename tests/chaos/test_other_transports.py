"""Servers that do not meet over TCP: the text is that of plain Transformers, also when they die and hang."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from swarmcore.testing.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "Once-upon-a-time,in-a-village-by-the-sea,there-lived"
TOKENS = 12
NEEDS = {"libp2p": "libp2p", "webrtc": "aiortc"}
LISTEN = {"libp2p": "/ip4/127.0.0.1/tcp/0", "webrtc": "127.0.0.1:0"}


@pytest.fixture(scope="module", params=NEEDS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(NEEDS[name], reason=f"needs the extra {name}")
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(make_fleet, talkative, transport) -> AsyncIterator[Fleet]:
    """Six servers of a tiny model, two for each stage."""
    network = {"transport": transport, "listen": LISTEN[transport]}
    async with make_fleet(model=talkative.folder, spans=talkative.spans, **network) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def reference(talkative):
    return talkative.reference


async def test_servers_are_killed_before_tokens_of_every_stage(client, fleet, transport, reference, delays):
    """kill -9 before every second token, at one stage after the other."""
    clock = asyncio.get_running_loop().time
    text = ""
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        for position in range(TOKENS):
            if position % 2 == 0:
                stage = position // 2 % 3
                await client.replicas_of(stage)
                victim = client.serving(session, stage)
                fleet.kill(victim.peer)
                fleet.start_soon(victim.span)
                began = clock()
                text += await anext(generation)
                delays(f"{transport}: kill -9 to the next token").append(clock() - began)
            else:
                text += await anext(generation)
    assert text == await reference.text(PROMPT, TOKENS)
    assert len(client.failovers) >= TOKENS // 2


async def test_several_generate_at_once(client, reference):
    texts = await client.model.generate_batch([PROMPT] * 2 + ["The-sea-was"], max_new_tokens=12)
    assert texts[0] == texts[1] == await reference.text(PROMPT, 12)
    assert texts[2] == await reference.text("The-sea-was", 12)


async def test_a_server_that_hangs_is_replaced(client, reference):
    async with client.model.session() as session:
        generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS, speculation="off")
        text = await anext(generation)
        hanging = client.serving(session, 1)
        hanging.process.signal(signal.SIGSTOP)
        try:
            text += "".join([piece async for piece in generation])
            assert hanging.peer not in session.chain.peers
        finally:
            hanging.process.signal(signal.SIGCONT)
    assert text == await reference.text(PROMPT, TOKENS)

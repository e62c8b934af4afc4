"""The peer at whose signalling service everybody met is killed: nothing stops."""

from __future__ import annotations

import pytest

from swarmcore.types import Address

pytest.importorskip("aiortc", reason="needs the extra webrtc")

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "In the beginning"
TOKENS = 12


async def test_the_only_signalling_service_is_killed(fork_server, make_fleet, open_client, reference):
    """Connections outlive the service where they began, and over them a server that dies is replaced."""
    meeting = await fork_server.start("bootstrap", "--transport", "webrtc", "--listen", "127.0.0.1:0")
    service = f"webrtc:ws:{Address.parse(meeting.address).location}"
    async with (
        meeting,
        make_fleet(replicas=2, transport="webrtc", listen=service, bootstrap=meeting.address) as fleet,
        open_client(fleet) as client,
    ):
        async with client.model.session() as session:
            generation = client.model.generate(PROMPT, session=session, max_new_tokens=TOKENS)
            text = await anext(generation)
            await meeting.kill()
            for stage in range(3):
                text += await anext(generation)
                fleet.kill(client.serving(session, stage).peer)
            text += "".join([piece async for piece in generation])
        assert text == await reference.text(PROMPT, TOKENS)
        assert len(client.failovers) >= 3

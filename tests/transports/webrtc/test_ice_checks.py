"""Checks of the ICE agent whose first copy does not come through a router."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from aioice import stun

from swarmcore_transports.webrtc.ice_agent import TricklingAgent


async def test_a_check_that_was_turned_away_is_repeated_when_the_peers_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a hole is punched by both sides. No timer repeats anything here."""
    monkeypatch.setattr(stun, "RETRY_RTO", 3600)
    dialler, listener = agents = [
        TricklingAgent((), lambda _: None, controlling=controlling) for controlling in (True, False)
    ]
    for agent in agents:
        await agent.gather_candidates()
    for agent, other in ((dialler, listener), (listener, dialler)):
        agent.remote_username, agent.remote_password = other.local_username, other.local_password
        for candidate in other.local_candidates:
            await agent.add_remote_candidate(candidate)
    turned_away = set()
    for protocol in listener._protocols:
        monkeypatch.setattr(protocol, "send_stun", refusing_first(protocol.send_stun, turned_away))
    async with asyncio.timeout(20):
        connecting = asyncio.create_task(listener.connect())
        while not turned_away:
            await asyncio.sleep(0)
        await asyncio.gather(dialler.connect(), connecting)
    for agent in agents:
        await agent.close()


def refusing_first(send, turned_away):
    """Drops the first copy of each request."""

    def send_stun(message, addr):
        if message.message_class is stun.Class.REQUEST and message.transaction_id not in turned_away:
            turned_away.add(message.transaction_id)
        else:
            send(message, addr)

    return send_stun

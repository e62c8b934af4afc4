"""What ICE agents make of the checks of a peer: too many, and one that a router turned away."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from aioice import stun

from swarmcore_transports.webrtc.aiortc.ice_agent import MAX_REMOTE, TrickleIceAgent


class Checker(asyncio.DatagramProtocol):
    """One of the many ports of a peer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[stun.Message] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        message = stun.parse_message(data)
        if message.message_class is stun.Class.RESPONSE and not self.answer.done():
            self.answer.set_result(message)


def check(agent: TrickleIceAgent) -> bytes:
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST)
    message.attributes["USERNAME"] = f"{agent.local_username}:{agent.remote_username}"
    message.attributes["PRIORITY"] = 1
    message.attributes["ICE-CONTROLLING"] = 1
    message.add_message_integrity(agent.local_password.encode())
    return bytes(message)


async def test_the_addresses_that_checks_come_from_are_bounded() -> None:
    loop = asyncio.get_running_loop()
    agent = TrickleIceAgent([], lambda candidate: None)
    agent.remote_username, agent.remote_password = secrets.token_hex(2), secrets.token_hex(11)
    checkers = []
    connecting = None
    try:
        await agent.gather_candidates()
        connecting = asyncio.create_task(agent.connect())
        place = next(one for one in agent.local_candidates if ":" not in one.host)
        for _ in range(MAX_REMOTE + 30):
            transport, checker = await loop.create_datagram_endpoint(
                Checker, remote_addr=(place.host, place.port)
            )
            checkers.append(transport)
            transport.sendto(check(agent))
            async with asyncio.timeout(10):
                await checker.answer  # all are answered, and so many are checked in turn
        assert len(agent.remote_candidates) == len(agent._check_list) == MAX_REMOTE
    finally:
        for transport in checkers:
            transport.close()
        await agent.close()
        if connecting:
            await asyncio.wait([connecting])
            connecting.exception()


async def test_a_check_that_was_turned_away_is_repeated_when_the_peers_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a hole is punched by both sides. No timer repeats anything here."""
    monkeypatch.setattr(stun, "RETRY_RTO", 3600)
    dialler, listener = agents = [
        TrickleIceAgent((), lambda _: None, controlling=controlling) for controlling in (True, False)
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

"""Checks that a peer sends to the ICE agent of the other side."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from aioice import stun

from swarmcore_transports.webrtc.ice_agent import MAX_REMOTE, TricklingAgent


class Checker(asyncio.DatagramProtocol):
    """One of the many ports of a peer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[stun.Message] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        message = stun.parse_message(data)
        if message.message_class is stun.Class.RESPONSE and not self.answer.done():
            self.answer.set_result(message)


def check(agent: TricklingAgent) -> bytes:
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST)
    message.attributes["USERNAME"] = f"{agent.local_username}:{agent.remote_username}"
    message.attributes["PRIORITY"] = 1
    message.attributes["ICE-CONTROLLING"] = 1
    message.add_message_integrity(agent.local_password.encode())
    return bytes(message)


async def test_the_addresses_that_checks_come_from_are_bounded() -> None:
    loop = asyncio.get_running_loop()
    agent = TricklingAgent([], lambda candidate: None)
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

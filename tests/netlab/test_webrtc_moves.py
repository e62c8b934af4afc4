"""WebRTC peers whose machines get another address in the midst of a stream, which goes on by another path."""

from __future__ import annotations

import asyncio

import pytest
from lab_peer import PATIENCE, LabPeer
from nat_lab import Host, nat_lab
from turn_server import turn_server, unavailable
from webrtc_homes import STUN, homes, signalling_peer

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no STUN server: {unavailable()}")

KEEPALIVE = 1.5
"""Three times that is what a stream survives."""

NEW: dict[Host, list[str]] = {"a": ["10.1.0.77", "10.1.0.78"], "b": ["10.2.0.77", "10.2.0.78"]}


async def more(client: LabPeer, stream: int) -> None:
    """Wait until so much has come back that all of it was sent after now."""
    before = await client.call("flowed", stream)
    await client.until("flowed", stream, shows=lambda now: now > before + 20)


@pytest.mark.parametrize("moving", ["b", "a"], ids=["dialler", "listener"])
async def test_a_stream_goes_on_when_a_home_moves(moving: Host) -> None:
    """Nothing of it is lost: every message comes back, in its order."""
    async with nat_lab() as lab, asyncio.timeout(2 * PATIENCE):
        await turn_server(lab)
        _, place = await signalling_peer(lab)
        _, client, address = await homes(lab, place, STUN, keepalive=KEEPALIVE)
        stream = await client.call("open_stream", address)
        await client.call("flow", stream)
        for address_there in NEW[moving]:
            await more(client, stream)
            lab.move(moving, address_there)
            await more(client, stream)
        assert await client.call("stop", stream) > 20 * len(NEW[moving])
        assert await client.call("path", stream) == "hole-punched"
        assert await client.call("restarts") >= len(NEW[moving])
        another = await client.call("open_stream", address)
        await client.call("exchange", another, [1, 70_000])

"""WebRTC peers whose machines get another address in the midst of a stream, which goes on by another path."""

from __future__ import annotations

import asyncio

import pytest
from netlab.lab_peer import PATIENCE, LabPeer
from netlab.netlab import Host, nat_lab
from netlab.test_webrtc_nat import STUN, homes, meeting_point
from netlab.turn import turn_server, unavailable

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_engines import ENGINES

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no STUN server: {unavailable()}")

KEEPALIVE = {"aiortc": 1.5, "wrtc": 4.0}
"""Three times that is what a stream survives. libwebrtc waits longer before it sends again what was lost."""

MOVES = {"aiortc": 2, "wrtc": 1}
"""How often a home moves; with libwebrtc it takes seconds each time."""

NEW: dict[Host, str] = {"a": "10.1.0.77", "b": "10.2.0.77"}


async def more(client: LabPeer, stream: int) -> None:
    """Wait until so much has come back that all of it was sent after now."""
    before = await client.call("flowed", stream)
    await client.until("flowed", stream, shows=lambda now: now > before + 20)


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.slow if name == "wrtc" else ()) for name in ENGINES]
)
@pytest.mark.parametrize("moving", ["b", "a"], ids=["dialler", "listener"])
async def test_a_stream_goes_on_when_a_home_moves(moving: Host, engine: str) -> None:
    """Nothing of it is lost: every message comes back, in its order."""
    async with nat_lab() as lab, asyncio.timeout(2 * PATIENCE):
        await turn_server(lab)
        _, place = await meeting_point(lab)
        _, client, address = await homes(lab, place, STUN, keepalive=KEEPALIVE[engine], engine=engine)
        stream = await client.call("open_stream", address)
        await client.call("flow", stream)
        new = [NEW[moving], NEW[moving].replace("77", "78")][: MOVES[engine]]
        for address_there in new:
            await more(client, stream)
            lab.move(moving, address_there)
            await more(client, stream)
        assert await client.call("stop", stream) > 20 * len(new)
        assert await client.call("path", stream) == "hole-punched"
        assert await client.call("restarts") >= len(new)
        another = await client.call("open_stream", address)
        await client.call("exchange", another, [1, 70_000])

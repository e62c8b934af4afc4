"""WebRTC peers behind routers: punched through, or relayed by TURN, and what goes on when a server dies."""

from __future__ import annotations

import pytest
from lab_peer import LabPeer
from nat_lab import ADDRESSES, Kind, nat_lab
from turn_server import PLACE, SECRET, turn_server, unavailable
from webrtc_homes import STUN, homes, signalling_peer

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no TURN server: {unavailable()}")

TURN = f"turn-secret:{SECRET}@{PLACE}"
MESSAGES = [1, 16 * 1024, 512 * 1024]


async def test_two_homes_punch_through_and_need_the_signalling_service_no_longer():
    async with nat_lab() as lab:
        stun = await turn_server(lab)
        public, place = await signalling_peer(lab)
        _, client, address = await homes(lab, place, f"stun:{ADDRESSES['public']}:1", STUN)
        stream = await client.call("open_stream", address)
        assert await client.call("path", stream) == "hole-punched"
        await public.kill()
        stun.kill()
        await client.call("exchange", stream, MESSAGES)
        another = await client.call("open_stream", address)
        await client.call("exchange", another, MESSAGES)


@pytest.mark.parametrize("kind", ["symmetric", "cone"])
async def test_a_turn_server_relays_where_no_hole_can_be_punched_or_none_may(kind: Kind):
    async with nat_lab(kind, kind) as lab:
        turn = await turn_server(lab)
        _, place = await signalling_peer(lab)
        _, client, address = await homes(lab, place, STUN, TURN, relay_only=kind == "cone", keepalive=0.3)
        stream = await client.call("open_stream", address)
        assert await client.call("path", stream) == "relayed"
        await client.call("exchange", stream, MESSAGES)
        turn.kill()
        await turn.wait()
        assert await client.call("end", stream) == "ConnectionLostError"
        await turn_server(lab)
        again = await client.call("open_stream", address)
        assert await client.call("path", again) == "relayed"


async def test_a_home_reaches_a_public_peer_directly():
    async with nat_lab() as lab:
        public, _ = await signalling_peer(lab)
        client = await LabPeer(lab, "a", scheme="webrtc").start()
        [address] = await public.call("addresses")
        stream = await client.call("open_stream", address)
        assert await client.call("path", stream) == "direct"

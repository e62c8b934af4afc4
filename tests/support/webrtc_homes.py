"""Homes in the NAT lab whose peers meet over WebRTC."""

from __future__ import annotations

import asyncio

from lab_peer import LabPeer
from nat_lab import ADDRESSES, NatLab
from turn_server import PLACE

STUN = f"stun:{PLACE}"


async def signalling_peer(lab: NatLab) -> tuple[LabPeer, str]:
    """A public peer, and its signalling service in the notation of ``listen_on``."""
    public = await LabPeer(lab, "public", scheme="webrtc", listen_on=["11.0.0.1:4001"]).start()
    return public, f"ws://{ADDRESSES['public']}:4001"


async def homes(lab: NatLab, place: str, *ice: str, **options: object) -> tuple[LabPeer, LabPeer, str]:
    """A server behind router a that is met at ``place``, a client behind b, and the server's address."""
    server, client = await asyncio.gather(
        LabPeer(lab, "a", scheme="webrtc", listen_on=[place], ice=ice, **options).start(),
        LabPeer(lab, "b", scheme="webrtc", ice=ice, **options).start(),
    )
    [address] = await server.call("addresses")
    return server, client, address

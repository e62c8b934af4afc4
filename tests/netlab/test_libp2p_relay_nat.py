"""libp2p peers behind routers that let nobody through: what they say goes by a relay."""

from __future__ import annotations

import asyncio

import pytest
from lab_peer import LabPeer
from nat_lab import NatLab, nat_lab

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

ANYWHERE = "/ip4/0.0.0.0/tcp"
MIB = 2**20


async def relay_at(lab: NatLab, port: int) -> tuple[LabPeer, str]:
    relay = await LabPeer(lab, "public", listen_on=[f"{ANYWHERE}/{port}"]).start()
    [address] = await relay.call("addresses")
    return relay, address


async def reserved_at(server: LabPeer, *ports: int) -> list[str]:
    """The addresses of ``server`` once it has reservations at the relays of these ports, and at no others."""

    def relayed(found: list[str]) -> list[str]:
        return [address for address in found if "p2p-circuit" in address]

    def shows(found: list[str]) -> bool:
        wanted = [f"/ip4/11.0.0.1/tcp/{port}/" for port in ports]
        return len(relayed(found)) == len(wanted) and all(any(w in a for a in found) for w in wanted)

    return relayed(await server.until("addresses", shows=shows))


async def test_homes_behind_symmetric_routers_exchange_messages_by_a_relay():
    async with nat_lab("symmetric", "symmetric") as lab:
        _, at = await relay_at(lab, 4001)
        server, client = await asyncio.gather(
            LabPeer(lab, "a", listen_on=[f"{ANYWHERE}/4101"], relays=[at], upnp=False).start(),
            LabPeer(lab, "b").start(),
        )
        [address] = await reserved_at(server, 4001)
        stream = await client.call("open_stream", address)
        await client.call("exchange", stream, [1, 70_000, 3 * MIB])
        assert await client.call("path", stream) == "relayed"


async def test_another_relay_is_taken_when_one_dies_before_there_is_a_direct_way():
    async with nat_lab("symmetric", "symmetric") as lab:
        (first, at_first), (_, at_second), (_, at_third) = [
            await relay_at(lab, port) for port in (4001, 4002, 4003)
        ]
        server, client = await asyncio.gather(
            LabPeer(
                lab, "a", listen_on=[f"{ANYWHERE}/4101"], relays=[at_first, at_second], upnp=False
            ).start(),
            LabPeer(lab, "b").start(),
        )
        await reserved_at(server, 4001, 4002)
        await server.call("open_stream", at_third)
        await first.kill()
        for address in await reserved_at(server, 4002, 4003):
            stream = await client.call("open_stream", address)
            assert await client.call("path", stream) == "relayed"

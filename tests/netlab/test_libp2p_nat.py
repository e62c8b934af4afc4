"""libp2p peers behind routers: relayed, then punched through or not, and what the routers map."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import pytest
from lab_peer import LabPeer
from nat_lab import NatLab, nat_lab, unavailable

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

ANYWHERE = "/ip4/0.0.0.0/tcp"


async def public_peer(lab: NatLab) -> LabPeer:
    """It relays for others, and says where it is."""
    return await LabPeer(lab, "public", listen_on=[f"{ANYWHERE}/4001"]).start()


async def homes(lab: NatLab, relay: LabPeer) -> tuple[LabPeer, LabPeer, str]:
    """A server behind router a, with a reservation at ``relay``, a client behind b, the server's address."""
    [at] = await relay.call("addresses")
    server, client = await asyncio.gather(
        LabPeer(lab, "a", listen_on=[f"{ANYWHERE}/4101"], relays=[at], upnp=False).start(),
        LabPeer(lab, "b").start(),
    )
    addresses = await server.until("addresses", shows=lambda found: "p2p-circuit" in found[-1])
    return server, client, addresses[-1]


def tried(said: str) -> bool:
    return not said.startswith("nobody")


async def test_two_homes_punch_through_and_no_longer_need_the_relay():
    async with nat_lab() as lab:
        relay = await public_peer(lab)
        server, client, address = await homes(lab, relay)
        stream = await client.call("open_stream", address)
        assert await client.until("path", stream, shows=lambda path: path != "relayed") == "hole-punched"
        assert await client.call("status", server.peer) == ""
        # It shows the new path from when the client has left the old one; what goes there and back after
        # that has found the server gone from there, too.
        await client.call("exchange", stream, [1])
        await relay.kill()
        assert await client.call("path", stream) == "hole-punched"
        assert await client.call("path", await client.call("open_stream", address)) == "hole-punched"


async def test_a_home_behind_a_symmetric_router_stays_relayed_and_all_know_how_they_are_reached():
    async with nat_lab(kind_b="symmetric") as lab:
        relay = await public_peer(lab)
        server, client, address = await homes(lab, relay)
        stream = await client.call("open_stream", address)
        said = await server.until("status", client.peer, shows=lambda standing: "symmetric" in standing)
        assert said.startswith("relayed; a direct connection failed 1 times so far: no packet came through")
        assert await client.call("path", stream) == "relayed"
        assert await client.call("connections", server.peer) == ["RELAYED"]
        assert "not reachable" in await server.until("reached", shows=tried)
        assert await server.call("notes") == [
            "libp2p: reached through relays only: not reachable from outside: no peer that tried got through"
        ]
        said = await relay.until("reached", shows=tried)
        assert said == "reachable from outside at /ip4/11.0.0.1/tcp/4001"
        assert await relay.call("notes") == []


TAKE_A_PORT = """
import miniupnpc
router = miniupnpc.UPnP()
router.discoverdelay = 200
router.discover()
router.selectigd()
router.addportmapping(4101, "TCP", router.lanaddr, 9, "somebody else", "", 600)
"""

LIST_PORTS = """
import itertools, miniupnpc
router = miniupnpc.UPnP()
router.discoverdelay = 200
router.discover()
router.selectigd()
mapped = map(router.getgenericportmapping, itertools.count())
print(*(entry[0] for entry in itertools.takewhile(bool, mapped)))
"""


async def run(lab: NatLab, host, program: str) -> str:
    process = await lab.run(host, [sys.executable, "-c", program], stdout=PIPE)
    return (await process.communicate())[0].decode()


@pytest.mark.skipif(unavailable(upnp=True) is not None, reason=f"no UPnP lab: {unavailable(upnp=True)}")
async def test_a_router_lets_others_in_for_as_long_as_a_peer_listens():
    async with nat_lab() as lab:
        await lab.map_ports("a")
        await run(lab, "a", TAKE_A_PORT)
        relay, server, client = await asyncio.gather(
            public_peer(lab),
            LabPeer(lab, "a", listen_on=[f"{ANYWHERE}/4101"]).start(),
            LabPeer(lab, "b").start(),
        )
        addresses = await server.until("addresses", shows=lambda found: "/11.0.0.2/" in found[-1])
        assert "/tcp/4101/" not in addresses[-1], "the router maps that port for somebody else"
        stream = await client.call("open_stream", addresses[-1])
        assert await client.call("path", stream) == "direct"
        await server.call("open_stream", (await relay.call("addresses"))[0])
        said = await server.until("reached", shows=tried)
        assert (
            said == f"reachable from outside at {addresses[-1].removeprefix('libp2p:').partition('/p2p')[0]}"
        )
        await server.close()
        assert (await run(lab, "a", LIST_PORTS)).split() == ["4101"]

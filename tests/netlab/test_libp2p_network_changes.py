"""libp2p peers whose machines get another address while they talk: a laptop that changes its Wi-Fi."""

from __future__ import annotations

import asyncio

import pytest
from lab_peer import LabPeer
from nat_lab import nat_lab

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

NEW = "10.1.0.77"
NOTICED = 5.0
"""Seconds after which a peer has seen that its own address is gone."""


async def test_a_client_that_moves_notices_and_goes_on():
    async with nat_lab() as lab:
        server = await LabPeer(lab, "public", listen_on=["/ip4/0.0.0.0/tcp/4001"]).start()
        client = await LabPeer(lab, "a").start()
        [address] = await server.call("addresses")
        in_use = await client.call("open_stream", address)
        await client.call("exchange", in_use, [1000])
        lab.move("a", NEW)
        async with asyncio.timeout(NOTICED):
            assert await client.call("end", in_use) == "ConnectionLostError"
            again = await client.call("open_stream", address)
            await client.call("exchange", again, [1, 70_000])


async def test_a_server_that_moves_is_found_where_it_is_now():
    async with nat_lab() as lab:
        relay = await LabPeer(lab, "public", listen_on=["/ip4/0.0.0.0/tcp/4001"]).start()
        [at] = await relay.call("addresses")
        server, client = await asyncio.gather(
            LabPeer(lab, "a", listen_on=["/ip4/0.0.0.0/tcp/4101"], relays=[at], upnp=False).start(),
            LabPeer(lab, "b").start(),
        )
        before = await server.until("addresses", shows=lambda found: "p2p-circuit" in found[-1])
        stream = await client.call("open_stream", before[-1])
        assert await client.until("path", stream, shows=lambda path: path != "relayed") == "hole-punched"
        lab.move("a", NEW)
        after = await server.until(
            "addresses", shows=lambda found: NEW in found[0] and "p2p-circuit" in found[-1]
        )
        assert after == [before[0].replace("10.1.0.2", NEW), before[-1]]
        again = await client.call("open_stream", after[-1])
        await client.call("exchange", again, [1, 70_000])

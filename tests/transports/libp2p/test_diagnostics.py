"""What a listening peer says of why it is not reached better."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from relayed_peers import PATIENCE, PLACE, RelayedPeers

from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig
from swarmcore.rpc import Node
from swarmcore.serving import run_bootstrap
from swarmcore.types import Address
from swarmcore.wire.messages import InfoRequest
from swarmcore.wire.protocols import INFO_METHOD

REASON = "reached through relays only: nobody has tried to reach this peer from outside"


async def test_a_relayed_peer_says_so_and_one_that_is_dialled_says_nothing():
    async with RelayedPeers() as peers:
        relay = await peers.relay()
        server = await peers.server(relay)
        await server.through(relay)
        assert server.transport.notes() == [f"libp2p: {REASON}"]
        [note] = relay.transport.notes()
        assert "it listens on loopback" in note, "all there is to say"
        assert list(peers.client().transport.notes()) == []


async def test_a_member_of_the_swarm_tells_whoever_asks():
    async with RelayedPeers() as peers:
        relay = await peers.relay()
        told: asyncio.Queue[Sequence[str]] = asyncio.Queue()
        options = {"libp2p": {"relays": (str(relay.addresses[0]),)}}
        member = asyncio.create_task(
            run_bootstrap(
                NetworkConfig(transports={"libp2p": [PLACE]}, options=options),
                Identity.generate(),
                on_online=lambda info: told.put_nowait(info.addresses),
                on_addresses=told.put_nowait,
            )
        )
        async with asyncio.timeout(PATIENCE):
            while "/p2p-circuit/" not in (addresses := await told.get())[-1]:
                pass
        client = peers.client().transport
        asker = Node(client.identity, [client])
        reply = await asker.call(Address.parse(addresses[0]), INFO_METHOD, InfoRequest())
        assert reply.notes == (f"libp2p: {REASON}",)
        member.cancel()
        await asyncio.wait([member])

"""What peers of a closed swarm do for strangers: nothing but say so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import pytest_asyncio
from libp2p.peer.id import ID
from relayed_peers import PLACE, Peer, RelayedPeers, check_echo

from swarmcore.errors import PeerNotAllowedError, PeerUnreachableError
from swarmcore.identity import Identity
from swarmcore.rpc import Node
from swarmcore.types import Address
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.multiaddrs import to_multiaddr
from swarmcore_transports.libp2p.services import Services


@pytest_asyncio.fixture
async def peers() -> AsyncIterator[RelayedPeers]:
    async with RelayedPeers() as peers:
        yield peers


async def closed_relay(peers: RelayedPeers, *members: Identity) -> Peer:
    relay = peers.client(listen_on=[PLACE], relay="on")
    relay.transport.allow_only([member.peer for member in members])
    await relay.listen()
    return relay


async def connected(peer: Peer, to: Peer, function: Callable[[Services], Awaitable[Any]]) -> Any:
    """What ``function`` of the services of ``peer`` returns once that is connected to ``to``."""
    thread, host = await peer.transport.trio_side()

    async def call() -> Any:
        await host.connect(ID.from_string(to.id), to_multiaddr(to.addresses[0]))
        return await function(peer.transport._services)

    return await thread.call(call, timeout=10, what="asking")


def dialled_back_by(other: Peer) -> Callable[[Services], Awaitable[Any]]:
    async def ask(services: Services) -> Any:
        [connection] = services.host.connections(ID.from_string(other.id))
        return await services.autonat.request_dial_back(connection, [1])

    return ask


async def test_members_alone_get_reservations_and_circuits(peers: RelayedPeers):
    one, other = Identity.generate(), Identity.generate()
    relay = await closed_relay(peers, one, other)
    server = await peers.listening(one, listen_on=[PLACE], relays=[str(relay.addresses[0])])
    [address] = await server.through(relay)
    await check_echo(await peers.client(identity=other).transport.open_stream(address), 1000)
    with pytest.raises(PeerUnreachableError, match="does not relay for this peer; have its owner allow it"):
        await peers.client().transport.open_stream(address)
    with pytest.raises(PeerUnreachableError, match="does not relay for this peer"):
        await connected(await peers.server(), relay, lambda own: own.relay_client._reserve(relay.id))


async def test_members_alone_are_dialled_back(peers: RelayedPeers):
    member = Identity.generate()
    other = await closed_relay(peers, member)
    asker = await peers.listening(member, listen_on=[PLACE])
    assert (await connected(asker, other, dialled_back_by(other))).host == "127.0.0.1"
    with pytest.raises(PeerUnreachableError, match="this swarm is closed"):
        await connected(await peers.server(), other, dialled_back_by(other))


async def test_a_node_closes_its_transports_and_still_says_so_to_those_that_call(peers: RelayedPeers):
    identity = Identity.generate()
    transport = Libp2pTransport(identity, listen_on=[PLACE], relay="on")
    client = peers.client().transport
    async with Node(identity, [transport], allowed_peers=[]) as node:
        [address] = node.addresses
        with pytest.raises(PeerNotAllowedError, match="this swarm is closed; ask its owner"):
            await Node(client.identity, [client]).call(address, PING_METHOD, Ping())
        through = f"{address.location}/{node.peer}/p2p-circuit/p2p"
        with pytest.raises(PeerUnreachableError, match="does not relay for this peer"):
            await client.open_stream(Address("libp2p", through, Identity.generate().peer))

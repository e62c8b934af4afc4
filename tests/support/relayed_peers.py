"""libp2p peers on loopback that reach each other through relays, as if nobody could dial them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest

from swarmcore.errors import ConnectionLostError, StreamClosedError
from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore_transports.libp2p import Libp2pTransport

PLACE = "/ip4/127.0.0.1/tcp/0"
PATIENCE = 20.0


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


def is_relayed(address: Address) -> bool:
    return "/p2p-circuit/" in str(address)


class Peer:
    """A transport, and the addresses that it announces."""

    def __init__(self, identity: Identity | None = None, **options: Any) -> None:
        self.transport = Libp2pTransport(identity or Identity.generate(), **options)
        self.transport.on_addresses = self._told
        self.addresses: tuple[Address, ...] = ()
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def id(self) -> str:
        return self.transport.identity.peer

    @property
    def relayed(self) -> list[Address]:
        return [address for address in self.addresses if is_relayed(address)]

    async def listen(self) -> None:
        addresses = await self.transport.listen(echo)
        self.addresses = self.addresses or addresses

    def _told(self, addresses: tuple[Address, ...]) -> None:
        self.addresses = addresses
        for waiting in self._waiting:
            waiting.set_result(None)
        self._waiting.clear()

    async def announces(self, condition: Callable[[list[Address]], object]) -> list[Address]:
        """Wait until ``condition`` of the relayed addresses is true; those."""
        async with asyncio.timeout(PATIENCE):
            while not condition(self.relayed):
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]
        return self.relayed

    async def through(self, *relays: Peer) -> list[Address]:
        """Wait for a reservation at each of ``relays`` and no other; the addresses there, in their order."""
        names = [relay.id for relay in relays]

        def relay_of(address: Address) -> str:
            return str(address).partition("/p2p-circuit/")[0].rpartition("/")[2]

        found = await self.announces(lambda addresses: sorted(map(relay_of, addresses)) == sorted(names))
        return sorted(found, key=lambda address: names.index(relay_of(address)))


class RelayedPeers:
    """Makes peers, and closes them all when the ``async with`` block is left."""

    async def __aenter__(self) -> Self:
        self._peers: list[Peer] = []
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(peer.transport.close() for peer in self._peers))

    async def relay(self, identity: Identity | None = None, **options: Any) -> Peer:
        return await self.listening(identity, **{"relay": "on", "listen_on": [PLACE], **options})

    async def server(self, *relays: Peer, **options: Any) -> Peer:
        """One that asks ``relays`` for reservations."""
        given: Sequence[str] = [str(relay.addresses[0]) for relay in relays]
        return await self.listening(listen_on=[PLACE], relays=given, **options)

    def client(self, **options: Any) -> Peer:
        return self._kept(Peer(**options))

    async def listening(self, identity: Identity | None = None, **options: Any) -> Peer:
        peer = self._kept(Peer(identity, **options))
        await peer.listen()
        return peer

    def _kept(self, peer: Peer) -> Peer:
        self._peers.append(peer)
        return peer


async def check_echo(stream: Stream, *sizes: int) -> None:
    """Send a message of each size and compare what comes back."""
    for size in sizes:
        message = (bytes(range(251)) * (size // 251 + 1))[:size]
        async with asyncio.timeout(PATIENCE):
            await stream.send(message)
            assert bytes(await stream.receive()) == message


async def check_end(stream: Stream) -> None:
    """Wait until it turns out that ``stream`` is no more."""
    with pytest.raises((ConnectionLostError, StreamClosedError)):
        async with asyncio.timeout(PATIENCE):
            await stream.receive()

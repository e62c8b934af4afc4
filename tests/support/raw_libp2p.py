"""A peer of py-libp2p alone, in a trio thread, that says to others whatever a test wants it to say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.rcmgr.manager import ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from swarmcore.types import Address, PeerId
from swarmcore_transports.libp2p.multiaddrs import to_address, to_multiaddr
from swarmcore_transports.libp2p.trio_thread import TrioThread

T = TypeVar("T")


class RawPeer:
    """``host`` is to be touched only by functions that are given to `run`."""

    def __init__(self) -> None:
        key_pair = create_new_key_pair()
        noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        self.host: IHost = new_host(
            key_pair=key_pair,
            sec_opt={NOISE: noise},
            muxer_preference="YAMUX",
            resource_manager=ResourceManager(
                enable_connection_tracking=False, enable_rate_limiting=False, enable_memory_limits=False
            ),
            connection_config=ConnectionConfig(max_connections_per_peer=1000, dial_timeout=5.0),
        )
        self._thread = TrioThread(self._live, name="raw-libp2p", on_crash=lambda error: None)

    async def _live(self, ready: Callable[[], None], stop: trio.Event) -> None:
        async with self.host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            ready()
            await stop.wait()
            async with trio.open_nursery() as nursery:
                for connection in self.host.get_network().get_connections():
                    nursery.start_soon(cut, connection)

    @property
    def address(self) -> Address:
        return to_address(self.host.get_transport_addrs()[0], PeerId(str(self.host.get_id())))

    async def run(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Await ``function(host, *arguments)`` in trio, for at most 10 seconds."""
        return await self._thread.call(function, self.host, *arguments, timeout=10.0, what="the raw peer")


@asynccontextmanager
async def raw_peer() -> AsyncIterator[RawPeer]:
    peer = RawPeer()
    await peer._thread.start(10.0)
    try:
        yield peer
    finally:
        await peer._thread.close()


async def connect(host: IHost, address: Address) -> INetConn:
    """A new connection to ``address``, whatever others there are."""
    network: Any = host.get_network()
    connection: INetConn = await network.dial_addr(to_multiaddr(address), ID.from_string(address.peer))
    return connection


async def cut(connection: INetConn) -> None:
    """End ``connection`` as a process that is killed does."""
    with trio.move_on_after(1):
        await connection.muxed_conn.secured_conn.close()  # type: ignore[attr-defined]

"""Sockets of the libp2p host are counted with all others, and those that prove nothing make room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from small_resources import bounded

from swarmcore.identity import Identity
from swarmcore.resources import Bounds, Resource
from swarmcore.transport import Stream
from swarmcore.types import Address

libp2p = pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")
from swarmcore_transports.libp2p.multiaddrs import host_of, port_of, to_multiaddr  # noqa: E402


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


@asynccontextmanager
async def listening(bounds: Bounds) -> AsyncIterator[tuple[libp2p.Libp2pTransport, Address]]:
    transport = libp2p.Libp2pTransport(Identity.generate(), listen_on=["127.0.0.1:0"], upnp=False)
    transport.resources = bounded(descriptors=bounds)
    try:
        async with asyncio.timeout(30):
            [address] = await transport.listen(echo)
            yield transport, address
    finally:
        await transport.close()


async def round_trip(address: Address) -> None:
    dialler = libp2p.Libp2pTransport(Identity.generate())
    try:
        stream = await dialler.open_stream(address)
        await stream.send(b"there and back")
        assert bytes(await stream.receive()) == b"there and back"
        await stream.close()
    finally:
        await dialler.close()


async def test_of_those_that_prove_nothing_the_oldest_make_room() -> None:
    async with listening(Bounds(100, 50, unproven=4, protocol=100)) as (transport, address):
        at = to_multiaddr(address)
        silent = []
        for _ in range(6):
            silent.append(await asyncio.open_connection(host_of(at), port_of(at)))
            while transport.resources.used(Resource.DESCRIPTORS) < min(len(silent), 3):
                await asyncio.sleep(0.01)
        for reader, _ in silent[:2]:  # strangers get three quarters of the bound
            await reader.read()
        await round_trip(address)
        for _, writer in silent:
            writer.close()
        while transport.resources.used(Resource.DESCRIPTORS):
            await asyncio.sleep(0.01)


async def test_connections_that_carry_nothing_make_room() -> None:
    async with listening(Bounds(4, 4, unproven=4, protocol=4)) as (transport, address):
        idle = [libp2p.Libp2pTransport(Identity.generate()) for _ in range(3)]
        for peer in idle:
            thread, host = await peer.trio_side()
            await thread.call(_connect, host, address, timeout=10.0, what="connecting")
        while transport.resources.used(Resource.DESCRIPTORS) < 3:
            await asyncio.sleep(0.01)
        for _ in range(20):
            try:
                await round_trip(address)
                break
            except Exception:  # it came a moment too early
                await asyncio.sleep(0.05)
        else:
            pytest.fail("nobody has made room")
        await asyncio.gather(*(peer.close() for peer in idle))


async def _connect(host: object, address: Address) -> None:
    from libp2p.peer.id import ID

    await host.connect(ID.from_string(address.peer), to_multiaddr(address))  # type: ignore[attr-defined]

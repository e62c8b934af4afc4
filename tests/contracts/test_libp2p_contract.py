from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from swarmcore.identity import Identity
from swarmcore.testing.transport_contract import TransportContract
from swarmcore.transport import Transport
from swarmcore.types import Address
from swarmcore.wire.limits import Limits

libp2p = pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")
multiaddrs = pytest.importorskip("swarmcore_transports.libp2p.multiaddrs", reason="needs the extra libp2p")


class TestLibp2p(TransportContract):
    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return libp2p.Libp2pTransport(identity, limits=limits, listen_on=listen_on)

    def free_place(self) -> str:
        return "/ip4/127.0.0.1/tcp/0"

    def place_of(self, address: Address) -> str:
        return address.location.removesuffix("/p2p")

    async def send_garbage(self, address: Address, data: bytes) -> None:
        multiaddr = multiaddrs.to_multiaddr(address)
        reader, writer = await asyncio.open_connection(
            multiaddr.value_for_protocol("ip4"), int(multiaddr.value_for_protocol("tcp"))
        )
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    @pytest.mark.every_loop
    async def test_messages_arrive_whole_and_in_order_both_ways(self) -> None:
        await super().test_messages_arrive_whole_and_in_order_both_ways()

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
from swarmcore_transports.tcp import TcpTransport
from swarmcore_transports.tcp.addresses import endpoint_of


@pytest.mark.every_loop
class TestTcp(TransportContract):
    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return TcpTransport(identity, limits=limits, listen_on=listen_on)

    def free_place(self) -> str:
        return "127.0.0.1:0"

    async def send_garbage(self, address: Address, data: bytes) -> None:
        endpoint = endpoint_of(address)
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

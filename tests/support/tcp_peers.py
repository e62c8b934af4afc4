"""Two TCP transports that tests let talk to each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.tcp import TcpTransport


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


@asynccontextmanager
async def listening(
    handler=echo, *, place: str = "127.0.0.1:0", limits: Limits | None = None
) -> AsyncIterator[tuple[TcpTransport, TcpTransport, Address]]:
    listener = TcpTransport(Identity.generate(), listen_on=[place], limits=limits)
    dialler = TcpTransport(Identity.generate(), limits=limits)
    try:
        async with asyncio.timeout(30):
            yield listener, dialler, (await listener.listen(handler))[0]
    finally:
        await dialler.close()
        await listener.close()


async def round_trip(stream: Stream, message: bytes = b"hello") -> None:
    await stream.send(message)
    assert bytes(await stream.receive()) == message


async def settle(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)

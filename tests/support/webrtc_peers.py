"""WebRTC peers in this process: who dials, who listens and echoes, and the service where they meet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from swarmcore.identity import Identity
from swarmcore.transport import Stream
from swarmcore.types import Address
from swarmcore.wire.limits import Limits
from swarmcore_transports.webrtc import WebRtcTransport
from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.signalling.service import SignallingService

HERE = ServiceAddress("127.0.0.1", 0)
LIMITS = Limits(connect_timeout=5.0)
HASTY = Limits(connect_timeout=0.5)


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def exchanged(transport: Any, address: Address) -> None:
    """Say something at ``address``, and hear it come back."""
    stream = await transport.open_stream(address)
    await stream.send(b"there and back")
    assert bytes(await stream.receive()) == b"there and back"
    await stream.close()


@asynccontextmanager
async def dialler(limits: Limits = LIMITS, **options: Any) -> AsyncIterator[Any]:
    """A transport, closed in the end."""
    transport = WebRtcTransport(Identity.generate(), limits=limits, **options)
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def listening(limits: Limits = LIMITS) -> AsyncIterator[tuple[Any, Address]]:
    """One that echoes, at a service of its own, and its address."""
    async with dialler(limits, listen_on=["127.0.0.1:0"]) as listener:
        [address] = await listener.listen(echo)
        yield listener, address


@asynccontextmanager
async def service(
    kind: Callable[[], SignallingService] = SignallingService, at: ServiceAddress = HERE
) -> Any:
    """A running service, which is at its ``place``."""
    running = kind()
    running.place = await running.start(at)  # type: ignore[attr-defined]
    try:
        yield running
    finally:
        await running.close()

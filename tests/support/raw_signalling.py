"""A peer, and a service, that say by signalling whatever a test wants them to say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import attrs
from aiohttp import web

from swarmcore.identity import Identity
from swarmcore.types import PeerId
from swarmcore_transports.webrtc.addresses import PATH, ServiceAddress
from swarmcore_transports.webrtc.signalling.messages import (
    Absent,
    Challenge,
    Envelope,
    Register,
    Registered,
    Signal,
    SignalKind,
    decode,
    encode,
    registration,
    signed_envelope,
)

Socket = aiohttp.ClientWebSocketResponse
Talk = Callable[[web.WebSocketResponse], Awaitable[None]]


@attrs.frozen
class RawPeer:
    """Registered at a service, and with no transport behind it."""

    identity: Identity
    socket: Socket

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    async def send(self, receiver: PeerId, exchange: bytes, kind: SignalKind, body: str) -> None:
        await self.socket.send_str(encode(signed_envelope(self.identity, receiver, exchange, kind, body)))

    async def receive(self) -> Envelope | Absent:
        """The next signal that the service passes on."""
        signal = decode(await self.socket.receive_str(timeout=10.0))
        assert isinstance(signal, Envelope | Absent)
        return signal


@asynccontextmanager
async def connected(service: ServiceAddress) -> AsyncIterator[Socket]:
    """A socket to ``service`` on which nothing has been said yet."""
    async with aiohttp.ClientSession() as session, session.ws_connect(service.url) as socket:
        yield socket


@asynccontextmanager
async def registered(service: ServiceAddress, identity: Identity | None = None) -> AsyncIterator[RawPeer]:
    identity = identity or Identity.generate()
    async with connected(service) as socket:
        challenge = decode(await socket.receive_str(timeout=10.0))
        assert isinstance(challenge, Challenge)
        await socket.send_str(encode(registration(identity, challenge)))
        assert isinstance(decode(await socket.receive_str(timeout=10.0)), Registered)
        yield RawPeer(identity, socket)


@asynccontextmanager
async def site(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[ServiceAddress]:
    """A web server that gives ``answer`` where a signalling service is expected."""
    application = web.Application()
    application.router.add_get(PATH, answer)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield ServiceAddress("127.0.0.1", int(runner.addresses[0][1]))
    finally:
        await runner.cleanup()


@asynccontextmanager
async def talking(talk: Talk) -> AsyncIterator[ServiceAddress]:
    """A service that says to everybody what ``talk`` does, then waits for the other to hang up."""

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await talk(socket)
        async for _ in socket:
            pass
        return socket

    async with site(answer) as service:
        yield service


async def admit(socket: web.WebSocketResponse) -> None:
    """Let a peer register, whoever it says it is."""
    await socket.send_str(encode(Challenge(bytes(32))))
    assert isinstance(decode(await socket.receive_str(timeout=10.0)), Register)
    await socket.send_str(encode(Registered()))


def say(*signals: Signal | str | bytes) -> Talk:
    """Talk that does not depend on what the other says."""

    async def talk(socket: web.WebSocketResponse) -> None:
        for one in signals:
            if isinstance(one, bytes):
                await socket.send_bytes(one)
            else:
                await socket.send_str(one if isinstance(one, str) else encode(one))

    return talk

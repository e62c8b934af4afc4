"""The WebRTC transport: peers find each other through a signalling service and talk over data channels."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections.abc import Coroutine, Sequence
from typing import Any

import attrs

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    InputError,
    PeerIdentityError,
    PeerUnreachableError,
    ProtocolError,
    StreamClosedError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connections import Connections
from swarmcore_transports.framed.frames import Kind, encode_frame
from swarmcore_transports.framed.greeting import Greeter
from swarmcore_transports.framed.stream import FramedStream
from swarmcore_transports.own_addresses import reachable_hosts
from swarmcore_transports.webrtc.channel_pipe import ChannelPipe
from swarmcore_transports.webrtc.engine import AiortcConnection, DataChannel, IceServer, PeerConnection
from swarmcore_transports.webrtc.locations import SCHEME, Service, service_of
from swarmcore_transports.webrtc.signalling_client import SignallingClient, absent
from swarmcore_transports.webrtc.signalling_service import ServiceLimits, SignallingService
from swarmcore_transports.webrtc.signals import EXCHANGE_BYTES, Absent, Envelope, sealed

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0

MAX_ANSWERING = 64
"""Most offers of others that are being answered at a time; further ones are refused."""


@attrs.define(eq=False)
class _Link:
    """The connection to one peer: being made, or made."""

    peer: PeerId
    connection: PeerConnection
    exchange: bytes
    answer: asyncio.Future[str]
    pipes: set[ChannelPipe] = attrs.field(factory=set)


class WebRtcTransport(Transport):
    """Streams over WebRTC data channels; addresses are ``webrtc://host:port/<peer id>``.

    Host and port are those of a signalling service, where the peer is met.

    ``listen_on`` says where this peer can be met: ``host:port`` runs a signalling service there,
    ``ws://host:port`` or ``wss://host:port`` registers at one that others run. ``announce`` replaces the
    addresses of services run here. ``ice`` are STUN and TURN servers, without which only peers are reached
    that see each other. ``tls`` secures the services run here, ``trusted`` says which foreign ones to
    believe; by default those that the system does.
    """

    scheme = SCHEME
    default_places = ("0.0.0.0:0",)

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
        ice: Sequence[IceServer] = (),
        tls: ssl.SSLContext | None = None,
        trusted: ssl.SSLContext | None = None,
        service_limits: ServiceLimits | None = None,
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._ice = tuple(ice)
        self._tls = tls
        self._trusted = trusted
        self._service_limits = service_limits
        self._listening = False
        self._services: list[SignallingService] = []
        self._clients: dict[Service, tuple[SignallingClient, asyncio.Task[None]]] = {}
        self._connecting: dict[PeerId, asyncio.Task[_Link]] = {}
        self._links: dict[PeerId, _Link] = {}
        self._exchanges: dict[bytes, _Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering = 0
        self._connections = Connections(self.limits, _is_closing)
        self._greeter = Greeter(self._connections, self.limits)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._listening else "open"
        return f"<WebRtcTransport {short(self.identity.peer)} {state} · {len(self._links)} peers>"

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._listening:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['host:port']")
        announce = [Service.parse(_location(text, self.identity.peer)) for text in self.announce]
        own = [place for place in self.listen_on if "://" not in place]
        foreign = [Service.parse(place) for place in self.listen_on if "://" in place]
        self._connections.serve(on_stream)
        self._listening = True
        try:
            met = [await self._serve(Service.parse(place)) for place in own]
            clients = [self._client(attrs.evolve(one, host=_reached(one.host)[0])) for one in met]
            clients += [self._client(one) for one in foreign]
            async with asyncio.timeout(self.limits.connect_timeout):
                for client in clients[: len(met)]:
                    await client.ready()
                if foreign and not met:
                    await self._any_ready(clients)
        except TimeoutError as exc:
            await self.close()
            raise AddressError("no signalling service answers; check that one runs there") from exc
        except BaseException:
            await self.close()
            raise
        spelt_out = announce or [
            attrs.evolve(one, host=host) for one in met for host in reachable_hosts(one.host)
        ]
        return tuple(one.address(self.identity.peer) for one in [*spelt_out, *foreign])

    async def _serve(self, place: Service) -> Service:
        service = SignallingService(self._service_limits)
        found = await service.start(place, self._tls)
        self._services.append(service)
        return found

    async def _any_ready(self, clients: Sequence[SignallingClient]) -> None:
        """One living service will do; the others are tried on."""
        waits = [asyncio.ensure_future(client.ready()) for client in clients]
        try:
            for wait in asyncio.as_completed(waits):
                try:
                    await wait
                    return
                except SwarmError as exc:
                    failure = exc
            raise failure
        finally:
            for waiting in waits:
                waiting.cancel()

    def _client(self, service: Service) -> SignallingClient:
        if service not in self._clients:
            client = SignallingClient(
                self.identity,
                service,
                self._signalled,
                timeout=self.limits.connect_timeout,
                tls=self._trusted,
                rng=random.Random(),
            )
            self._clients[service] = client, asyncio.create_task(client.run())
        return self._clients[service][0]

    # --- signalling -----------------------------------------------------------------------------------

    def _signalled(self, client: SignallingClient, signal: Envelope | Absent) -> None:
        link = self._exchanges.get(signal.exchange)
        if isinstance(signal, Absent):
            if link and signal.receiver == link.peer:
                _fail(link.answer, absent(signal))
            return
        try:
            signal.check(self.identity.peer)
            if link and signal.sender != link.peer:
                raise PeerIdentityError(
                    f"dialled {short(link.peer)}, and {short(signal.sender)} answered; the address is out of "
                    f"date, or the signalling service misdirects"
                )
        except SwarmError as exc:
            logger.info("signalling service %s: %s", client.service, exc)
            if link:
                _fail(link.answer, exc)
            return
        if signal.kind == "offer":
            self._in_background(self._answer(client, signal))
        elif link is None:
            return
        elif signal.kind == "answer" and not link.answer.done():
            link.answer.set_result(signal.body)
        elif signal.kind == "refusal":
            reason = signal.body[:200]
            _fail(link.answer, PeerUnreachableError(f"{short(link.peer)} refuses: {reason}"))

    async def _answer(self, client: SignallingClient, offer: Envelope) -> None:
        peer = PeerId(offer.sender)
        refusal = ""
        if not self._listening or self._closed:
            refusal = "this peer takes no connections"
        elif self._answering >= MAX_ANSWERING:
            refusal = "this peer is answering too many others; try again later"
        if refusal:
            await self._send(client, sealed(self.identity, peer, offer.exchange, "refusal", refusal))
            return
        self._answering += 1
        link = self._new_link(peer, offer.exchange)
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                answer = await link.connection.answer(offer.body)
                await self._send(client, sealed(self.identity, peer, offer.exchange, "answer", answer))
                await link.connection.connected()
            self._connected(link)
        except (SwarmError, TimeoutError) as exc:
            logger.debug("no connection from %s: %r", short(peer), exc)
            if isinstance(exc, ProtocolError):
                await self._send(client, sealed(self.identity, peer, offer.exchange, "refusal", exc.message))
            await link.connection.close()
        except BaseException:
            await link.connection.close()
            raise
        finally:
            self._answering -= 1

    async def _send(self, client: SignallingClient, envelope: Envelope) -> None:
        try:
            await client.send(envelope)
        except SwarmError as exc:
            logger.debug("%s", exc)

    # --- links ----------------------------------------------------------------------------------------

    def _new_link(self, peer: PeerId, exchange: bytes) -> _Link:
        loop = asyncio.get_running_loop()
        link = _Link(peer, AiortcConnection(self._ice), exchange, loop.create_future())
        link.connection.on_channel = lambda channel: self._channel_arrived(link, channel)
        link.connection.on_lost = lambda reason: self._lost(link, reason)
        return link

    def _connected(self, link: _Link) -> None:
        before = self._links.get(link.peer)
        self._links[link.peer] = link
        if before and not before.pipes:
            self._in_background(before.connection.close())

    def _lost(self, link: _Link, reason: str) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            logger.info("the connection to %s is gone: %s", short(link.peer), reason)
        for pipe in tuple(link.pipes):
            pipe.abort()
        self._in_background(link.connection.close())

    def _channel_arrived(self, link: _Link, channel: DataChannel) -> None:
        pipe = self._pipe(link, channel)
        if self._listening and not self._closed:
            self._greeter.accepted(pipe, link.peer)
        else:
            pipe.abort()

    def _pipe(self, link: _Link, channel: DataChannel) -> ChannelPipe:
        pipe = ChannelPipe(channel, link.connection.path, link.pipes.discard)
        link.pipes.add(pipe)
        return pipe

    # --- dialling -------------------------------------------------------------------------------------

    async def open_stream(self, address: Address) -> Stream:
        self._check_open()
        service = service_of(address)
        peer = address.peer
        connection = self._connections.take(peer)
        if connection is None:
            seconds = self.limits.connect_timeout
            try:
                async with asyncio.timeout(seconds):
                    link = self._links.get(peer) or await self._link_to(peer, service)
                    channel = await link.connection.open_channel()
                    connection = await self._greeter.dialled(self._pipe(link, channel), peer)
            except TimeoutError as exc:
                self._check_open()
                raise PeerUnreachableError(
                    f"{short(peer)} did not answer by {service} within {seconds:g} s"
                ) from exc
        connection.write(encode_frame(Kind.OPEN))
        return FramedStream(connection, peer, self.limits)

    async def _link_to(self, peer: PeerId, service: Service) -> _Link:
        """One exchange at a time for each peer, whoever waits for it or stops waiting."""
        task = self._connecting.get(peer)
        if task is None:
            task = self._connecting[peer] = asyncio.create_task(self._dial(peer, service))
            task.add_done_callback(lambda _: self._connecting.pop(peer, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, not by who waits here
                self._check_open()
            raise
        except SwarmError as exc:
            self._check_open()
            raise type(exc)(exc.message, **exc.details) from exc

    async def _dial(self, peer: PeerId, service: Service) -> _Link:
        link = self._new_link(peer, secrets.token_bytes(EXCHANGE_BYTES))
        self._exchanges[link.exchange] = link
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                client = self._client(service)
                offer = await link.connection.offer()
                await client.send(sealed(self.identity, peer, link.exchange, "offer", offer))
                await link.connection.accept(await link.answer)
                await link.connection.connected()
        except ConnectionLostError as exc:
            await link.connection.close()
            raise PeerUnreachableError(f"cannot reach {short(peer)}: {exc.message}") from exc
        except TimeoutError as exc:
            await link.connection.close()
            raise PeerUnreachableError(f"{short(peer)} did not answer by {service} in time") from exc
        except BaseException:
            await link.connection.close()
            raise
        finally:
            del self._exchanges[link.exchange]
        self._connected(link)
        return link

    # --- the end --------------------------------------------------------------------------------------

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()):
            logger.error("%r: a task failed", self, exc_info=exc)

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this transport is closed")

    async def close(self) -> None:
        self._closed = True
        self._connections.begin_close()
        await self._connections.finish_close()
        tasks = [*self._connecting.values(), *self._tasks, *(task for _, task in self._clients.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        self._clients.clear()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.connection.close() for link in links))
        for service in self._services:
            await service.close()
        self._services.clear()
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)


def _is_closing(connection: Connection) -> bool:
    return connection.transport is None or connection.transport.is_closing()


def _fail(future: asyncio.Future[str], error: SwarmError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen here: the dial may have been given up


def _reached(host: str) -> list[str]:
    return ["127.0.0.1"] if host == "0.0.0.0" else ["::1"] if host == "::" else [host]


def _location(text: str, peer: PeerId) -> str:
    """What ``--announce`` says, a whole address or ``host:port``, without the peer."""
    if not text.startswith(f"{SCHEME}:"):
        return text
    address = Address.parse(text)
    if address.peer != peer:
        raise AddressError(f"cannot announce {text!r}: it names another peer than this one, {peer}")
    return address.location

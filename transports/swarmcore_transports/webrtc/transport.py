"""The WebRTC transport: peers find each other through a signalling service and talk over data channels."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

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
    TooManyCallsError,
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
from swarmcore_transports.webrtc.engine import AiortcConnection, DataChannel
from swarmcore_transports.webrtc.ice import IceServer, IceServers
from swarmcore_transports.webrtc.links import Link, Links
from swarmcore_transports.webrtc.locations import SCHEME, Service, announced_location, service_of
from swarmcore_transports.webrtc.offers import MAX_ANSWERING, Offers
from swarmcore_transports.webrtc.signalling_client import SignallingClient, absent
from swarmcore_transports.webrtc.signalling_clients import SignallingClients
from swarmcore_transports.webrtc.signalling_service import ServiceLimits, SignallingService
from swarmcore_transports.webrtc.signals import EXCHANGE_BYTES, Absent, Envelope, sealed

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0

_MAX_TASKS = 4 * MAX_ANSWERING


class WebRtcTransport(Transport):
    """Streams over WebRTC data channels; addresses are ``webrtc://host:port/<peer id>``.

    Host and port are those of a signalling service, where the peer is met.

    ``listen_on`` says where this peer can be met: ``host:port`` runs a signalling service there,
    ``ws://host:port`` or ``wss://host:port`` registers at one that others run. ``announce`` replaces the
    addresses of services run here. ``ice`` are STUN and TURN servers, or how they are written (see
    `IceServer.parse`), without which only peers are reached that see each other; with ``relay_only`` nothing
    but a TURN server ever learns where this peer is. ``tls`` secures the services run here, ``trusted`` says
    which foreign ones to believe; by default those that the system does.
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
        ice: Sequence[IceServer | str] = (),
        relay_only: bool = False,
        tls: ssl.SSLContext | None = None,
        trusted: ssl.SSLContext | None = None,
        service_limits: ServiceLimits | None = None,
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._ice = IceServers(ice)
        if relay_only and not self._ice.can_relay:
            raise AddressError("relay-only needs a TURN server; name one as turn:USER:PASSWORD@HOST:PORT")
        self._relay_only = relay_only
        self._tls = tls
        self._trusted = trusted
        self._service_limits = service_limits
        self._listening = False
        self._services: list[SignallingService] = []
        self._clients = SignallingClients(self._make_client)
        self._connecting: dict[tuple[PeerId, Service], asyncio.Task[Link]] = {}
        self._links = Links(self.limits, self._in_background)
        self._exchanges: dict[bytes, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._offers = Offers()
        self.counters: Counter[str] = Counter()
        """What was dropped since the start, by name: forged, repeated and ignored signals, and offers
        that came faster than they could be refused."""
        self._connections = Connections(self.limits, _is_closing)
        self._greeter = Greeter(self._connections, self.limits)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._listening else "open"
        return f"<WebRtcTransport {short(self.identity.peer)} {state} · {len(self._links)} peers>"

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        return Service.parse(announced_location(place, peer).removesuffix(f"/{peer}")).address(peer)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._listening:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['host:port']")
        announce = [Service.parse(announced_location(text, self.identity.peer)) for text in self.announce]
        own = [place for place in self.listen_on if "://" not in place]
        foreign = [Service.parse(place) for place in self.listen_on if "://" in place]
        self._connections.serve(on_stream)
        self._listening = True
        try:
            met = [await self._serve(Service.parse(place)) for place in own]
            clients = [self._clients.keep(one.from_here()) for one in met]
            clients += [self._clients.keep(one) for one in foreign]
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

    def _make_client(self, service: Service) -> SignallingClient:
        return SignallingClient(
            self.identity,
            service,
            self._signalled,
            timeout=self.limits.connect_timeout,
            tls=self._trusted,
            rng=random.Random(),
        )

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
            self.counters["forged"] += 1
            logger.info("signalling service %s: %s", client.service, exc)
            if link:
                _fail(link.answer, exc)
            return
        if signal.kind == "offer":
            self._offered(client, signal)
        elif link is None or link.answer.done():
            self.counters["ignored"] += 1
        elif signal.kind == "answer":
            link.answer.set_result(signal.body)
        elif signal.kind == "refusal":
            reason = signal.body[:200]
            _fail(link.answer, PeerUnreachableError(f"{short(link.peer)} refuses: {reason}"))

    def _offered(self, client: SignallingClient, offer: Envelope) -> None:
        peer = PeerId(offer.sender)
        if len(self._tasks) >= _MAX_TASKS:
            self.counters["overflow"] += 1
        elif peer == self.identity.peer or not self._offers.is_new(offer.exchange):
            self.counters["repeated"] += 1
        elif not self._listening or self._closed:
            self._in_background(self._reply(client, offer, "refusal", "this peer takes no connections"))
        elif self._links.full or not self._offers.begin(peer):
            busy = "this peer is answering too many others; try again later"
            self._in_background(self._reply(client, offer, "refusal", busy))
        else:
            self._in_background(self._answer(client, offer))

    async def _answer(self, client: SignallingClient, offer: Envelope) -> None:
        peer = PeerId(offer.sender)
        link: Link | None = None
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                link = await self._new_link(peer, offer.exchange)
                answer = await link.connection.answer(offer.body)
                await self._reply(client, offer, "answer", answer)
                await link.connection.connected()
            self._links.add(link)
        except (SwarmError, TimeoutError) as exc:
            logger.debug("no connection from %s: %r", short(peer), exc)
            if isinstance(exc, ProtocolError | PeerUnreachableError):
                await self._reply(client, offer, "refusal", exc.message)
            if link:
                await link.connection.close()
        except BaseException:
            if link:
                await link.connection.close()
            raise
        finally:
            self._offers.end(peer)

    async def _reply(
        self, client: SignallingClient, offer: Envelope, kind: Literal["answer", "refusal"], body: str
    ) -> None:
        try:
            await client.send(sealed(self.identity, PeerId(offer.sender), offer.exchange, kind, body))
        except SwarmError as exc:
            logger.debug("%s", exc)

    # --- links ----------------------------------------------------------------------------------------

    async def _new_link(self, peer: PeerId, exchange: bytes) -> Link:
        ice = await self._ice.choose()
        if self._relay_only and not any(one.relays for one in ice):
            raise PeerUnreachableError("only a relay may be used, and no TURN server answers")
        loop = asyncio.get_running_loop()
        connection = AiortcConnection(ice, relay_only=self._relay_only)
        link = Link(peer, connection, exchange, loop.create_future())
        connection.on_channel = lambda channel: self._channel_arrived(link, channel)
        connection.on_lost = lambda reason: self._links.lost(link, reason)
        return link

    def _channel_arrived(self, link: Link, channel: DataChannel) -> None:
        pipe = self._links.pipe(link, channel)
        if pipe and self._listening and not self._closed:
            self._greeter.accepted(pipe, link.peer)
        elif pipe:
            pipe.abort()

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
                    connection = await self._dialled_again(peer)
                    if connection is None:
                        connection = await self._open(await self._link_to(peer, service))
            except TimeoutError as exc:
                self._check_open()
                raise PeerUnreachableError(
                    f"{short(peer)} did not answer by {service} within {seconds:g} s"
                ) from exc
        connection.write(encode_frame(Kind.OPEN))
        return FramedStream(connection, peer, self.limits)

    async def _open(self, link: Link) -> Connection:
        pipe = self._links.pipe(link, await link.connection.open_channel())
        if pipe is None:
            raise TooManyCallsError(f"too many streams to {short(link.peer)}; close some first")
        return await self._greeter.dialled(pipe, link.peer)

    async def _dialled_again(self, peer: PeerId) -> Connection | None:
        """Another channel of the link there is. None when there is none, or it is found dead."""
        link = self._links.get(peer)
        if link is None:
            return None
        try:
            async with asyncio.timeout(min(self.limits.keepalive, self.limits.connect_timeout / 2)):
                return await self._open(link)
        except (ConnectionLostError, PeerUnreachableError, TimeoutError) as exc:
            self._check_open()
            self._links.lost(link, f"it took no further channel: {exc!r}")
            return None

    async def _link_to(self, peer: PeerId, service: Service) -> Link:
        """One exchange at a time for each peer and service, whoever waits for it or stops waiting."""
        key = peer, service
        task = self._connecting.get(key)
        if task is None:
            task = self._connecting[key] = asyncio.create_task(self._dial(peer, service))
            task.add_done_callback(lambda _: self._connecting.pop(key, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, not by who waits here
                self._check_open()
            raise
        except SwarmError as exc:
            self._check_open()
            raise type(exc)(exc.message, **exc.details) from exc

    async def _dial(self, peer: PeerId, service: Service) -> Link:
        link: Link | None = None
        try:
            with self._clients.using(service) as client:
                async with asyncio.timeout(self.limits.connect_timeout):
                    link = await self._new_link(peer, secrets.token_bytes(EXCHANGE_BYTES))
                    self._exchanges[link.exchange] = link
                    offer = await link.connection.offer()
                    await client.send(sealed(self.identity, peer, link.exchange, "offer", offer))
                    await link.connection.accept(await link.answer)
                    await link.connection.connected()
        except BaseException as exc:
            if link:
                await link.connection.close()
            if isinstance(exc, ConnectionLostError):
                self._ice.forget()
                raise PeerUnreachableError(f"cannot reach {short(peer)}: {exc.message}") from exc
            if isinstance(exc, TimeoutError):
                raise PeerUnreachableError(f"{short(peer)} did not answer by {service} in time") from exc
            raise
        finally:
            if link:
                del self._exchanges[link.exchange]
        self._links.add(link)
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
        tasks = [*self._connecting.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        await asyncio.gather(self._clients.close(), self._links.close(), self._ice.close())
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

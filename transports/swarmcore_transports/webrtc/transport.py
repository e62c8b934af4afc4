"""The WebRTC transport: peers find each other through a signalling service and talk over data channels."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections import Counter
from collections.abc import Collection, Coroutine, Sequence
from typing import Any

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    InputError,
    PeerUnreachableError,
    ProtocolError,
    ResourceLimitError,
    StreamClosedError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.identity import Identity
from swarmcore.pacing import TokenBucket
from swarmcore.resources import Priority, Resource
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.handshake import Handshaker
from swarmcore_transports.webrtc.addresses import SCHEME, Service, announced_service, service_of
from swarmcore_transports.webrtc.engine import DataChannel, connection_class
from swarmcore_transports.webrtc.ice import IceServer, IceServers
from swarmcore_transports.webrtc.ice_restarts import Restarts
from swarmcore_transports.webrtc.peer_connections import Dials, Link, Links
from swarmcore_transports.webrtc.signalling.client import SignallingClient
from swarmcore_transports.webrtc.signalling.clients import SignallingClients
from swarmcore_transports.webrtc.signalling.endpoints import MeetingPoints
from swarmcore_transports.webrtc.signalling.messages import EXCHANGE_BYTES, Envelope, sealed
from swarmcore_transports.webrtc.signalling.negotiation import Exchange, Route
from swarmcore_transports.webrtc.signalling.negotiations import MAX_ANSWERING, Answering, Exchanges, Offers
from swarmcore_transports.webrtc.signalling.peer_relay import Passing
from swarmcore_transports.webrtc.signalling.service import ServiceLimits

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0

_SOCKETS_OF_A_LINK = 4  # one for each address of this machine, two or three as a rule
REFUSALS = 5.0, 20.0
"""Offers a second that are refused with a word, on average and at once: services pass on 20 messages of one
peer a second, and some of those answer offers."""

_MAX_TASKS = 4 * MAX_ANSWERING


class WebRtcTransport(Transport):
    """Streams over WebRTC data channels; addresses are ``webrtc://host:port/<peer id>``.

    Host and port are those of a signalling service, where the peer is met.

    ``listen_on`` says where this peer can be met: ``host:port`` runs a signalling service there,
    ``ws://host:port`` or ``wss://host:port`` registers at one that others run. ``announce`` replaces the
    addresses of services run here. ``ice`` are STUN and TURN servers, or how they are written (see
    `IceServer.parse`), without which only peers are reached that see each other; with ``relay_only`` nothing
    but a TURN server ever learns where this peer is. ``tls`` secures the services run here, ``trusted`` says
    which foreign ones to believe; by default those that the system does. ``engine`` names the WebRTC
    implementation among those that are installed (entry-point group ``swarmcore.webrtc_engines``);
    ``"auto"`` is aiortc.
    """

    scheme = SCHEME
    default_places = ("0.0.0.0:{port}", "[::]:{port}")

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
        engine: str = "auto",
    ) -> None:
        super().__init__(identity, limits=limits, listen_on=listen_on, announce=announce)
        self._ice = IceServers(ice)
        if relay_only and not self._ice.can_relay:
            raise AddressError("relay-only needs a TURN server; name one as turn:USER:PASSWORD@HOST:PORT")
        self._relay_only = relay_only
        self._connection_class = connection_class(engine)
        self._trusted = trusted
        self._listening = False
        self._clients = SignallingClients(self._make_client)
        self._meeting_points = MeetingPoints(
            identity.peer, self._clients, tls, service_limits, lambda: self.resources
        )
        self._dials = Dials(self._dial, self.limits.connect_timeout)
        self._links = Links(self.limits, self._link_lost)
        self._tasks: set[asyncio.Task[None]] = set()
        self._offers = Offers()
        self._refusals = TokenBucket(*REFUSALS)
        self.counters: Counter[str] = Counter()
        """What happened since the start, by name. Dropped: ``forged``, ``repeated`` and ``ignored`` signals,
        ``overflow`` of what came faster than it could be looked at, ``dropped`` ones that peers wanted passed
        on. ``passed`` on were others, ``absent`` was their receiver."""
        self._exchanges = Exchanges(identity, self._offers, self.counters, self._offered, self._restart_asked)
        self._passing = Passing(identity.peer, self._links, self._exchanges.signalled, self.counters)
        self._restarts = Restarts(
            self._links, self.limits, self._new_path, self._network_changed, self._in_background
        )
        self._connections = ConnectionManager(self.limits, _is_closing, lambda: self.resources)
        self._handshaker = Handshaker(self._connections, self.limits)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._listening else "open"
        return f"<WebRtcTransport {short(self.identity.peer)} {state} · {len(self._links)} peers>"

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        return announced_service(place, peer).address(peer)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._passing.allow_only(peers)
        self._meeting_points.allow_only(peers)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._listening:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['host:port']")
        self._meeting_points.choose(self.listen_on, self.announce)
        self._connections.serve(on_stream)
        self._listening = True
        try:
            await self._meeting_points.open(self.limits.connect_timeout)
        except BaseException:
            await self.close()
            raise
        self._restarts.start()  # watches the network, too
        return self._meeting_points.addresses()

    def notes(self) -> Sequence[str]:
        return [f"{SCHEME}: {note}" for note in self._meeting_points.notes()]

    def _make_client(self, service: Service, own: bool) -> SignallingClient:
        # A certificate for a domain is none for 127.0.0.1, where one's own service is.
        trusted = False if own else self._trusted or True
        return SignallingClient(
            self.identity,
            service,
            self._exchanges.signalled,
            timeout=self.limits.connect_timeout,
            tls=trusted,
            on_hung_up=self._service_gone,
            rng=random.Random(),
            counters=self.counters,
        )

    def _service_gone(self, service: Service) -> None:
        """It may have run in the same process as the peer that was met there."""
        for link in self._links.current():
            if link.dialled == service:
                link.connection.ask_peer()

    # --- signalling -----------------------------------------------------------------------------------

    def _new_exchange(self, link: Link) -> Exchange:
        exchange = Exchange(
            self.identity,
            link.peer,
            link.exchange,
            link.connection,
            self._in_background,
            lambda: self._passing.routes_to(link.peer),
        )
        self._exchanges.begin(exchange)
        return exchange

    def _offered(self, route: Route, offer: Envelope) -> None:
        peer = PeerId(offer.sender)
        if len(self._tasks) >= _MAX_TASKS:
            self.counters["overflow"] += 1
            self._exchanges.end(offer.exchange)
        elif not self._listening or self._closed:
            self._refuse(route, offer, "this peer takes no connections")
        elif self._links.full or (answering := self._begin(peer)) is None:
            self._refuse_for_lack_of_room(route, offer)
        else:
            answering.give_up = self._start(self._answer(route, offer, answering)).cancel

    def _refuse_for_lack_of_room(self, route: Route, offer: Envelope) -> None:
        if self._refusals.take(asyncio.get_running_loop().time()):
            self._refuse(route, offer, "this peer is answering too many others; try again later")
        else:
            self.counters["overflow"] += 1
            self._exchanges.end(offer.exchange)

    def _begin(self, peer: PeerId) -> Answering | None:
        return self._offers.begin(peer, asyncio.get_running_loop().time())

    async def _answer(self, route: Route, offer: Envelope, answering: Answering) -> None:
        peer = PeerId(offer.sender)
        link: Link | None = None
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                link = await self._new_link(peer, offer.exchange)
                await self._new_exchange(link).answer_offer(offer.body, route)
                await link.connection.connected()
            self._connected(link)
        except BaseException as exc:
            self._exchanges.end(offer.exchange)
            if link:
                await link.close()
            if not isinstance(exc, SwarmError | TimeoutError):
                raise
            logger.debug("no connection from %s: %r", short(peer), exc)
            if isinstance(exc, ProtocolError | PeerUnreachableError | ResourceLimitError):
                self._refuse(route, offer, exc.message)
        finally:
            self._offers.end(answering)

    def _restart_asked(self, route: Route, offer: Envelope) -> None:
        link = self._links.of_exchange(offer.exchange)
        if link is None or link.peer != offer.sender or link.dialled:
            self._refuse(route, offer, "there is no such connection any more")
        elif not link.limit.take(asyncio.get_running_loop().time()):
            self.counters["overflow"] += 1
        else:
            exchange = self._new_exchange(link)  # at once: the candidates that follow are for it
            self._in_background(self._answer_restart(route, offer, link, exchange))

    async def _answer_restart(self, route: Route, offer: Envelope, link: Link, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(self.limits.connect_timeout):
                await exchange.answer_offer(offer.body, route)
        except (SwarmError, TimeoutError) as exc:
            logger.info("no other path to %s: %r", short(link.peer), exc)
            self._refuse(route, offer, exc.message if isinstance(exc, SwarmError) else "too slow")

    def _refuse(self, route: Route, offer: Envelope, reason: str) -> None:
        if offer.kind == "offer":
            self._exchanges.end(offer.exchange)
        envelope = sealed(self.identity, PeerId(offer.sender), offer.exchange, "refusal", reason)
        self._in_background(_sent(route, envelope))

    # --- links ----------------------------------------------------------------------------------------

    async def _new_link(self, peer: PeerId, exchange: bytes, dialled: Service | None = None) -> Link:
        self._restarts.start()
        ice = await self._ice.choose()
        if self._relay_only and not any(one.relays for one in ice):
            raise PeerUnreachableError("only a relay may be used, and no TURN server answers")
        sockets = self.resources.reserve(
            peer,
            Resource.DESCRIPTORS,
            _SOCKETS_OF_A_LINK,
            priority=Priority.HIGH if dialled else Priority.MEDIUM,
        )
        try:
            connection = self._connection_class(ice, relay_only=self._relay_only)
        except BaseException:
            sockets.release()
            raise
        link = Link(peer, connection, exchange, dialled, sockets)
        connection.on_channel = lambda channel: self._channel_arrived(link, channel)
        connection.on_lost = lambda reason: self._links.lost(link, reason)
        connection.on_unanswered = lambda: self._restarts.unanswered(link)
        connection.on_moved = lambda: self._links.moved(link)
        return link

    def _connected(self, link: Link) -> None:
        self._links.add(link)
        self._passing.attach(link)

    def _link_lost(self, link: Link) -> None:
        self._exchanges.end(link.exchange)
        self._passing.detach(link)

    def _channel_arrived(self, link: Link, channel: DataChannel) -> None:
        pipe = self._links.pipe(link, channel)
        if pipe and self._listening and not self._closed:
            self._handshaker.accept(pipe, link.peer)
        elif pipe:
            pipe.abort()

    async def _new_path(self, link: Link) -> None:
        """Restart ICE of ``link``, which this side has dialled. Raise a `SwarmError` when nobody answers."""
        assert link.dialled
        with self._clients.using(link.dialled) as client:
            exchange = self._new_exchange(link)  # before its candidates are found
            await exchange.agree("restart", await link.connection.restart(), client)

    def _network_changed(self, gone: frozenset[str]) -> None:
        self._ice.forget()
        if gone:
            self._clients.reconnect()
        if self._listening and not self._closed:
            self.on_addresses(self._meeting_points.addresses())

    # --- dialling -------------------------------------------------------------------------------------

    async def open_stream(self, address: Address) -> Stream:
        self._check_open()
        service = service_of(address)
        peer = address.peer
        connection = self._connections.take_idle(peer)
        if connection is None:
            seconds = self.limits.connect_timeout
            try:
                async with asyncio.timeout(seconds):
                    connection = await self._dialled_again(peer)
                    if connection is None:
                        connection = await self._open(await self._dials.link_to(peer, service))
            except TimeoutError as exc:
                self._check_open()
                raise PeerUnreachableError(
                    f"{short(peer)} did not answer by {service} within {seconds:g} s"
                ) from exc
        return self._connections.open_stream(connection, peer)

    async def _open(self, link: Link) -> Connection:
        pipe = self._links.pipe(link, await link.connection.open_channel())
        if pipe is None:
            raise TooManyCallsError(f"too many streams to {short(link.peer)}; close some first")
        return await self._handshaker.dial(pipe, link.peer)

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

    async def _dial(self, peer: PeerId, service: Service) -> Link:
        name = secrets.token_bytes(EXCHANGE_BYTES)
        link: Link | None = None
        try:
            with self._clients.using(service) as client:
                async with asyncio.timeout(self.limits.connect_timeout):
                    link = await self._new_link(peer, name, service)
                    exchange = self._new_exchange(link)
                    await exchange.agree("offer", await link.connection.offer(), client)
                    await link.connection.connected()
        except BaseException as exc:
            self._exchanges.end(name)
            if link:
                await link.close()
            if isinstance(exc, ConnectionLostError):
                self._ice.forget()
                raise PeerUnreachableError(f"cannot reach {short(peer)}: {exc.message}") from exc
            if isinstance(exc, TimeoutError):
                raise PeerUnreachableError(f"{short(peer)} did not answer by {service} in time") from exc
            raise
        self._connected(link)
        return link

    # --- the end --------------------------------------------------------------------------------------

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(work)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

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
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await self._dials.close()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        await asyncio.gather(
            self._restarts.close(), self._clients.close(), self._links.close(), self._ice.close()
        )
        await self._meeting_points.close()
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)


def _is_closing(connection: Connection) -> bool:
    return connection.transport is None or connection.transport.is_closing()


async def _sent(route: Route, envelope: Envelope) -> None:
    try:
        await route.send(envelope)
    except SwarmError as exc:
        logger.debug("%r: %s", route, exc)

"""The WebRTC transport: peers find each other through a signalling service and talk over data channels."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Collection, Sequence

from swarmcore.errors import (
    AddressError,
    ConnectionLostError,
    InputError,
    PeerUnreachableError,
    StreamClosedError,
    TooManyCallsError,
)
from swarmcore.identity import Identity
from swarmcore.transport import OnStream, Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.connection import Connection
from swarmcore_transports.framed.connection_manager import ConnectionManager
from swarmcore_transports.framed.handshake import Handshaker
from swarmcore_transports.webrtc.addresses import SCHEME, announced_service, service_of
from swarmcore_transports.webrtc.connector import Connector
from swarmcore_transports.webrtc.engine import DataChannel, connection_class
from swarmcore_transports.webrtc.ice import IceServer, IceServers
from swarmcore_transports.webrtc.peer_connections import ManagedConnection
from swarmcore_transports.webrtc.signalling.endpoints import SignallingEndpoints
from swarmcore_transports.webrtc.signalling.service import ServiceLimits


class WebRtcTransport(Transport):
    """Streams over WebRTC data channels; addresses are ``webrtc://host:port/<peer id>``.

    Host and port are those of the signalling service where the peer is registered.

    ``listen_on`` says where this peer can be dialled: ``host:port`` runs a signalling service there,
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
        servers = IceServers(ice)
        if relay_only and not servers.can_relay:
            raise AddressError("relay-only needs a TURN server; name one as turn:USER:PASSWORD@HOST:PORT")
        self._connector = Connector(
            identity,
            self.limits,
            servers,
            connection_class(engine),
            relay_only=relay_only,
            trusted=trusted,
            resources=lambda: self.resources,
            on_channel=self._channel_opened,
            on_network_changed=self._network_changed,
        )
        self._endpoints = SignallingEndpoints(
            identity.peer, self._connector.clients, tls, service_limits, lambda: self.resources
        )
        self._connections = ConnectionManager(self.limits, _is_closing, lambda: self.resources)
        self._handshaker = Handshaker(self._connections, self.limits)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "listening" if self._connector.accepting else "open"
        peers = len(self._connector.connections)
        return f"<WebRtcTransport {short(self.identity.peer)} {state} · {peers} peers>"

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        return announced_service(place, peer).address(peer)

    @property
    def counters(self) -> Counter[str]:
        """What happened since the start, by name. Dropped: ``forged``, ``repeated`` and ``ignored`` signals,
        ``overflow`` of what came faster than it could be looked at, ``dropped`` ones that peers wanted passed
        on. ``passed`` on were others, ``absent`` was their receiver."""
        return self._connector.counters

    def allow_only(self, peers: Collection[PeerId]) -> None:
        self._connector.relay.allow_only(peers)
        self._endpoints.allow_only(peers)

    # --- listening ------------------------------------------------------------------------------------

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        self._check_open()
        if self._connector.accepting:
            raise InputError("this transport listens already")
        if not self.listen_on:
            raise AddressError("no place to listen on; pass listen_on=['host:port']")
        self._endpoints.choose(self.listen_on, self.announce)
        self._connections.serve(on_stream)
        self._connector.accepting = True
        try:
            await self._endpoints.open(self.limits.connect_timeout)
        except BaseException:
            await self.close()
            raise
        self._connector.restarter.start()  # watches the network, too
        return self._endpoints.addresses()

    def notes(self) -> Sequence[str]:
        return [f"{SCHEME}: {note}" for note in self._endpoints.notes()]

    def _channel_opened(self, managed: ManagedConnection, channel: DataChannel) -> None:
        """By the peer."""
        transport = self._connector.connections.add_channel(managed, channel)
        if transport and self._connector.accepting:
            self._handshaker.accept(transport, managed.peer)
        elif transport:
            transport.abort()

    def _network_changed(self) -> None:
        if self._connector.accepting:
            self.on_addresses(self._endpoints.addresses())

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
                    connection = await self._open_on_current(peer)
                    if connection is None:
                        connection = await self._open_on(await self._connector.dials.dial(peer, service))
            except TimeoutError as exc:
                self._check_open()
                raise PeerUnreachableError(
                    f"{short(peer)} did not answer by {service} within {seconds:g} s"
                ) from exc
        return self._connections.open_stream(connection, peer)

    async def _open_on(self, managed: ManagedConnection) -> Connection:
        channel = await managed.connection.open_channel()
        transport = self._connector.connections.add_channel(managed, channel)
        if transport is None:
            raise TooManyCallsError(f"too many streams to {short(managed.peer)}; close some first")
        return await self._handshaker.dial(transport, managed.peer)

    async def _open_on_current(self, peer: PeerId) -> Connection | None:
        """Over another channel of the connection there is. None when there is none, or it is found dead."""
        managed = self._connector.connections.get(peer)
        if managed is None:
            return None
        try:
            async with asyncio.timeout(min(self.limits.keepalive, self.limits.connect_timeout / 2)):
                return await self._open_on(managed)
        except (ConnectionLostError, PeerUnreachableError, TimeoutError) as exc:
            self._check_open()
            self._connector.connections.drop(managed, f"it took no further channel: {exc!r}")
            return None

    # --- the end --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosedError("this transport is closed")

    async def close(self) -> None:
        self._closed = True
        self._connector.accepting = False
        self._connections.begin_close()
        await self._connections.finish_close()
        await self._connector.close()
        await self._endpoints.close()


def _is_closing(connection: Connection) -> bool:
    return connection.transport is None or connection.transport.is_closing()

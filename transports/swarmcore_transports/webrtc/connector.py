"""How connections to peers come about: dialled, answered, and given another path, all by signalling."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections import Counter
from collections.abc import Callable

from swarmcore.errors import (
    ConnectionLostError,
    PeerUnreachableError,
    ProtocolError,
    ResourceLimitError,
    SwarmError,
)
from swarmcore.identity import Identity
from swarmcore.pacing import TokenBucket
from swarmcore.resources import Priority, Resource, ResourceManager
from swarmcore.tasks import BackgroundTasks, deadline_after
from swarmcore.types import PeerId, short
from swarmcore.wire.limits import Limits
from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.engine import DataChannel, PeerConnection
from swarmcore_transports.webrtc.ice import IceServers
from swarmcore_transports.webrtc.ice_restarts import IceRestarter
from swarmcore_transports.webrtc.peer_connections import DialSync, ManagedConnection, PeerConnections
from swarmcore_transports.webrtc.signalling.client import SignallingClient
from swarmcore_transports.webrtc.signalling.endpoints import SignallingClientPool
from swarmcore_transports.webrtc.signalling.messages import (
    NEGOTIATION_ID_BYTES,
    Envelope,
    signed_envelope,
)
from swarmcore_transports.webrtc.signalling.negotiation import Negotiation, Route
from swarmcore_transports.webrtc.signalling.negotiations import (
    MAX_INCOMING_OFFERS,
    IncomingOffer,
    IncomingOffers,
    Negotiations,
)
from swarmcore_transports.webrtc.signalling.peer_relay import PeerRelay

logger = logging.getLogger(__name__)

_SOCKETS_PER_CONNECTION = 4  # one for each address of this machine, two or three as a rule

REFUSAL_RATE = 5.0, 20.0
"""Offers a second that are refused with a reason, on average and at once: services pass on 20 messages of one
peer a second, and some of those answer offers."""

_MAX_TASKS = 4 * MAX_INCOMING_OFFERS


class Connector:
    """Makes the connections of one transport, and keeps those that are made.

    ``on_channel`` is told of each channel that a peer opens; ``on_network_changed`` is called when this
    machine has other addresses than before. ``trusted`` says which signalling services to believe.
    """

    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        ice: IceServers,
        make_connection: type[PeerConnection],
        *,
        relay_only: bool,
        trusted: ssl.SSLContext | None,
        resources: Callable[[], ResourceManager],
        on_channel: Callable[[ManagedConnection, DataChannel], None],
        on_network_changed: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._limits = limits
        self._ice = ice
        self._make_connection = make_connection
        self._relay_only = relay_only
        self._trusted = trusted
        self._resources = resources
        self._on_channel = on_channel
        self._on_network_changed = on_network_changed
        self.accepting = False
        """Whether offers are answered."""
        self.counters: Counter[str] = Counter()
        self.tasks = BackgroundTasks()
        self.clients = SignallingClientPool(self._make_client)
        self.dials = DialSync(self._dial, limits.connect_timeout)
        self.connections = PeerConnections(limits, self._connection_lost)
        self.offers = IncomingOffers()
        self.negotiations = Negotiations(
            identity, self.offers, self.counters, self._offer_received, self._restart_received
        )
        self.relay = PeerRelay(identity.peer, self.connections, self.negotiations.signalled, self.counters)
        self.restarter = IceRestarter(
            self.connections, limits, self._restart_ice, self._network_changed, self.tasks
        )
        self._refusals = TokenBucket(*REFUSAL_RATE)

    def _make_client(self, service: ServiceAddress, own: bool) -> SignallingClient:
        # A certificate for a domain is none for 127.0.0.1, where one's own service is.
        trusted = False if own else self._trusted or True
        return SignallingClient(
            self._identity,
            service,
            self.negotiations.signalled,
            timeout=self._limits.connect_timeout,
            tls=trusted,
            on_hung_up=self._service_gone,
            rng=random.Random(),
            counters=self.counters,
        )

    def _service_gone(self, service: ServiceAddress) -> None:
        """It may have run in the same process as the peer that was registered there."""
        for managed in self.connections.current():
            if managed.dialled == service:
                managed.connection.probe_peer()

    def _network_changed(self, gone: frozenset[str]) -> None:
        self._ice.forget()
        if gone:
            self.clients.reconnect()
        self._on_network_changed()

    # --- a connection ---------------------------------------------------------------------------------

    async def _new_connection(
        self, peer: PeerId, negotiation_id: bytes, dialled: ServiceAddress | None = None
    ) -> ManagedConnection:
        self.restarter.start()
        ice = await self._ice.choose()
        if self._relay_only and not any(one.relays for one in ice):
            raise PeerUnreachableError("only a relay may be used, and no TURN server answers")
        sockets = self._resources().reserve(
            peer,
            Resource.DESCRIPTORS,
            _SOCKETS_PER_CONNECTION,
            priority=Priority.HIGH if dialled else Priority.MEDIUM,
        )
        try:
            connection = self._make_connection(ice, relay_only=self._relay_only)
        except BaseException:
            sockets.release()
            raise
        managed = ManagedConnection(peer, connection, negotiation_id, dialled, sockets)
        connection.on_channel = lambda channel: self._on_channel(managed, channel)
        connection.on_lost = lambda reason: self.connections.drop(managed, reason)
        connection.on_unanswered = lambda: self.restarter.unanswered(managed)
        connection.on_path_changed = lambda: self.connections.path_changed(managed)
        return managed

    def _negotiate(self, managed: ManagedConnection) -> Negotiation:
        negotiation = Negotiation(
            self._identity,
            managed.peer,
            managed.negotiation_id,
            managed.connection,
            self.tasks,
            lambda: self.relay.routes_to(managed.peer),
        )
        self.negotiations.begin(negotiation)
        return negotiation

    def _connected(self, managed: ManagedConnection) -> None:
        self.connections.add(managed)
        self.relay.attach(managed)

    def _connection_lost(self, managed: ManagedConnection) -> None:
        self.negotiations.end(managed.negotiation_id)
        self.relay.detach(managed)

    # --- dialling -------------------------------------------------------------------------------------

    async def _dial(self, peer: PeerId, service: ServiceAddress) -> ManagedConnection:
        negotiation_id = secrets.token_bytes(NEGOTIATION_ID_BYTES)
        managed: ManagedConnection | None = None

        def late() -> SwarmError:
            return PeerUnreachableError(f"{short(peer)} did not answer by {service} in time")

        try:
            with self.clients.using(service) as client:
                async with deadline_after(self._limits.connect_timeout, late):
                    managed = await self._new_connection(peer, negotiation_id, service)
                    negotiation = self._negotiate(managed)
                    await negotiation.offer("offer", await managed.connection.offer(), client)
                    await managed.connection.connected()
        except BaseException as exc:
            self.negotiations.end(negotiation_id)
            if managed:
                await managed.close()
            if isinstance(exc, ConnectionLostError):
                self._ice.forget()
                raise PeerUnreachableError(f"cannot reach {short(peer)}: {exc.message}") from exc
            raise
        self._connected(managed)
        return managed

    async def _restart_ice(self, managed: ManagedConnection) -> None:
        """Of one that this side has dialled. Raise a `SwarmError` when nobody answers."""
        assert managed.dialled
        with self.clients.using(managed.dialled) as client:
            negotiation = self._negotiate(managed)  # before its candidates are found
            await negotiation.offer("restart", await managed.connection.restart(), client)

    # --- answering ------------------------------------------------------------------------------------

    def _offer_received(self, route: Route, offer: Envelope) -> None:
        now = asyncio.get_running_loop().time()
        if len(self.tasks) >= _MAX_TASKS:
            self.counters["overflow"] += 1
            self.negotiations.end(offer.exchange)
        elif not self.accepting:
            self._refuse(route, offer, "this peer takes no connections")
        elif not self.connections.full and (incoming := self.offers.begin(PeerId(offer.sender), now)):
            self.tasks.start(self._answer(route, offer, incoming), f"answer to {short(incoming.peer)}")
        elif self._refusals.take(now):
            self._refuse(route, offer, "this peer is answering too many others; try again later")
        else:
            self.counters["overflow"] += 1
            self.negotiations.end(offer.exchange)

    async def _answer(self, route: Route, offer: Envelope, incoming: IncomingOffer) -> None:
        task = asyncio.current_task()
        assert task
        incoming.give_up = task.cancel
        managed: ManagedConnection | None = None
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                managed = await self._new_connection(incoming.peer, offer.exchange)
                await self._negotiate(managed).answer(offer.body, route)
                await managed.connection.connected()
            self._connected(managed)
        except BaseException as exc:
            self.negotiations.end(offer.exchange)
            if managed:
                await managed.close()
            if not isinstance(exc, SwarmError | TimeoutError):
                raise
            logger.debug("no connection from %s: %r", short(incoming.peer), exc)
            if isinstance(exc, ProtocolError | PeerUnreachableError | ResourceLimitError):
                self._refuse(route, offer, exc.message)
        finally:
            self.offers.end(incoming)

    def _restart_received(self, route: Route, offer: Envelope) -> None:
        managed = self.connections.of_negotiation(offer.exchange)
        if managed is None or managed.peer != offer.sender or managed.dialled:
            self._refuse(route, offer, "there is no such connection any more")
        elif not managed.restart_limit.take(asyncio.get_running_loop().time()):
            self.counters["overflow"] += 1
        else:
            negotiation = self._negotiate(managed)  # at once: the candidates that follow are for it
            self.tasks.start(self._answer_restart(route, offer, negotiation), "answer to an ICE restart")

    async def _answer_restart(self, route: Route, offer: Envelope, negotiation: Negotiation) -> None:
        try:
            async with deadline_after(self._limits.connect_timeout, lambda: ProtocolError("too slow")):
                await negotiation.answer(offer.body, route)
        except SwarmError as exc:
            logger.info("no other path to %s: %r", short(negotiation.peer), exc)
            self._refuse(route, offer, exc.message)

    def _refuse(self, route: Route, offer: Envelope, reason: str) -> None:
        if offer.kind == "offer":
            self.negotiations.end(offer.exchange)
        refusal = signed_envelope(self._identity, PeerId(offer.sender), offer.exchange, "refusal", reason)
        self.tasks.start(_sent(route, refusal), "refusal")

    # --- the end --------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        self.accepting = False
        await self.dials.close()
        await self.tasks.close()
        await asyncio.gather(
            self.restarter.close(), self.clients.close(), self.connections.close(), self._ice.close()
        )


async def _sent(route: Route, envelope: Envelope) -> None:
    try:
        await route.send(envelope)
    except SwarmError as exc:
        logger.debug("%r: %s", route, exc)

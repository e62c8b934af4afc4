"""Signalling through third peers: over channel 0 of each connection, which both sides have at once."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from swarmcore.errors import PeerUnreachableError, ProtocolError
from swarmcore.pacing import TokenBucket
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.peer_connections import ManagedConnection, PeerConnections
from swarmcore_transports.webrtc.signalling.messages import Absent, Envelope, Signal, decode_forwarded, encode
from swarmcore_transports.webrtc.signalling.negotiation import MAX_ROUTES, Route
from swarmcore_transports.webrtc.signalling.service import ServiceLimits

logger = logging.getLogger(__name__)

_LIMITS = ServiceLimits()
"""What one peer may have forwarded is as much as at a signalling service."""

_MAX_QUEUED = 256 * 1024
"""Bytes that may wait for one slow peer; for a further envelope the sender hears that it is absent."""

OnSignal = Callable[[Route, Envelope | Absent], None]


class PeerRoute:
    """The route to others through one connected peer: also what comes from that peer, on the same channel."""

    def __init__(self, relay: PeerRelay, managed: ManagedConnection) -> None:
        self._relay = relay
        self._channel = managed.connection.signalling_channel
        self.peer = managed.peer
        self.limit = TokenBucket(_LIMITS.rate, _LIMITS.burst)

    def __repr__(self) -> str:
        return f"<PeerRoute through {short(self.peer)}>"

    async def send(self, envelope: Envelope) -> None:
        self.put(envelope)

    def put(self, signal: Signal) -> None:
        """Raise `PeerUnreachableError` when too much waits for that peer."""
        if self._channel.buffered_amount > _MAX_QUEUED:
            raise PeerUnreachableError(f"{short(self.peer)} takes no more signalling messages for now")
        self._channel.send(encode(signal).encode())

    def message_received(self, data: bytes) -> None:
        self._relay.received(self, data)

    def buffered_amount_low(self) -> None: ...

    def channel_closed(self) -> None: ...


class PeerRelay:
    """Forwards envelopes between the peers that are connected to this one, and takes those for itself.

    What a peer may have forwarded is what it sends itself, to one that is connected here. ``on_signal`` is
    told what is for this peer; the signatures are yet to be checked.
    """

    def __init__(
        self, own: PeerId, connections: PeerConnections, on_signal: OnSignal, counters: Counter[str]
    ) -> None:
        self._own = own
        self._connections = connections
        self._on_signal = on_signal
        self._counters = counters
        self._routes: dict[ManagedConnection, PeerRoute] = {}
        self._allowed: frozenset[PeerId] | None = None

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Pass nothing on from or to others."""
        self._allowed = frozenset(peers)

    def attach(self, managed: ManagedConnection) -> None:
        """``managed`` is connected: take what its peer sends."""
        route = self._routes[managed] = PeerRoute(self, managed)
        managed.connection.signalling_channel.set_handler(route)

    def detach(self, managed: ManagedConnection) -> None:
        """``managed`` is gone. Harmless when repeated."""
        self._routes.pop(managed, None)

    def routes_to(self, peer: PeerId) -> Sequence[Route]:
        """Through the peers connected to this one; whether they are connected to ``peer`` shows then."""
        routes = (self._routes.get(managed) for managed in self._connections.current())
        return [route for route in routes if route and route.peer != peer][: MAX_ROUTES - 1]

    def received(self, route: PeerRoute, data: bytes) -> None:
        """What the peer of ``route`` has sent."""
        if not route.limit.take(asyncio.get_running_loop().time()):
            self._counters["dropped"] += 1
            return
        try:
            signal = decode_forwarded(data)
        except ProtocolError as exc:
            self._counters["dropped"] += 1
            logger.debug("%s: %s", short(route.peer), exc)
            return
        if isinstance(signal, Absent) or signal.receiver == self._own:
            self._on_signal(route, signal)
        elif signal.sender == route.peer:
            self._forward(signal, route)
        else:
            self._counters["dropped"] += 1

    def _forward(self, envelope: Envelope, sender: PeerRoute) -> None:
        receiver = PeerId(envelope.receiver)
        managed = self._connections.get(receiver)
        try:
            if self._allowed is not None and not {receiver, envelope.sender} <= self._allowed:
                raise PeerUnreachableError("this peer passes nothing on for it: the swarm is closed")
            if managed is None or managed not in self._routes:
                raise PeerUnreachableError("it is not connected to the peer asked")
            self._routes[managed].put(envelope)
            self._counters["passed"] += 1
        except PeerUnreachableError as exc:
            self._counters["absent"] += 1
            try:
                sender.put(Absent(envelope.receiver, envelope.exchange, exc.message))
            except PeerUnreachableError:
                self._counters["dropped"] += 1

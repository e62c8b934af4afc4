"""Signalling by way of third peers: over the first channel of each connection, which all sides have."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from swarmcore.errors import PeerUnreachableError, ProtocolError
from swarmcore.pacing import TokenBucket
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.peer_connections import Link, Links
from swarmcore_transports.webrtc.signalling.messages import Absent, Envelope, Signal, decode_passed, encode
from swarmcore_transports.webrtc.signalling.negotiation import MAX_ROUTES, Route
from swarmcore_transports.webrtc.signalling.service import ServiceLimits

logger = logging.getLogger(__name__)

_LIMITS = ServiceLimits()
"""What one peer may have passed on is as much as at a signalling service."""

_MOST_QUEUED = 256 * 1024
"""Bytes that may wait for one slow peer; for a further envelope the sender hears that it is absent."""

OnSignal = Callable[[Route, Envelope | Absent], None]


class PeerRoute:
    """The way to others through one connected peer."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.limit = TokenBucket(_LIMITS.rate, _LIMITS.burst)

    def __repr__(self) -> str:
        return f"<PeerRoute through {short(self._link.peer)}>"

    async def send(self, envelope: Envelope) -> None:
        self.put(envelope)

    def put(self, signal: Signal) -> None:
        """Raise `PeerUnreachableError` when too much waits for that peer."""
        channel = self._link.connection.signals
        if channel.queued > _MOST_QUEUED:
            raise PeerUnreachableError(f"{short(self._link.peer)} takes no more signalling messages for now")
        channel.send(encode(signal).encode())


class Passing:
    """Passes envelopes between the peers that are connected to this one, and takes those for itself.

    What a peer may have passed on is what it says itself, to one that is connected here. ``on_signal`` is
    told what is for this peer; the signatures are yet to be checked.
    """

    def __init__(self, own: PeerId, links: Links, on_signal: OnSignal, counters: Counter[str]) -> None:
        self._own = own
        self._links = links
        self._on_signal = on_signal
        self._counters = counters
        self._routes: dict[Link, PeerRoute] = {}
        self._allowed: frozenset[PeerId] | None = None

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Pass nothing on from or to others."""
        self._allowed = frozenset(peers)

    def attach(self, link: Link) -> None:
        """``link`` is connected: listen to what its peer says."""
        route = self._routes[link] = PeerRoute(link)
        link.connection.signals.use(_Listener(self, link, route))

    def detach(self, link: Link) -> None:
        """``link`` is gone. Harmless when repeated."""
        self._routes.pop(link, None)

    def routes_to(self, peer: PeerId) -> Sequence[Route]:
        """Through the peers connected to this one; whether they are connected to ``peer`` shows then."""
        found = [
            self._routes[link] for link in self._links.current() if link.peer != peer and link in self._routes
        ]
        return found[: MAX_ROUTES - 1]

    def heard(self, link: Link, route: PeerRoute, data: bytes) -> None:
        """Of the peer of ``link``."""
        if not route.limit.take(asyncio.get_running_loop().time()):
            self._counters["dropped"] += 1
            return
        try:
            signal = decode_passed(data)
        except ProtocolError as exc:
            self._counters["dropped"] += 1
            logger.debug("%s: %s", short(link.peer), exc)
            return
        if isinstance(signal, Absent) or signal.receiver == self._own:
            self._on_signal(route, signal)
        elif signal.sender == link.peer:
            self._pass(signal, route)
        else:
            self._counters["dropped"] += 1

    def _pass(self, envelope: Envelope, sender: PeerRoute) -> None:
        receiver = PeerId(envelope.receiver)
        link = self._links.get(receiver)
        try:
            if self._allowed is not None and not {receiver, envelope.sender} <= self._allowed:
                raise PeerUnreachableError("this peer passes nothing on for it: the swarm is closed")
            if link is None or link not in self._routes:
                raise PeerUnreachableError("it is not connected to the peer asked")
            self._routes[link].put(envelope)
            self._counters["passed"] += 1
        except PeerUnreachableError as exc:
            self._counters["absent"] += 1
            try:
                sender.put(Absent(envelope.receiver, envelope.exchange, exc.message))
            except PeerUnreachableError:
                self._counters["dropped"] += 1


class _Listener:
    """Uses the first channel of one connection."""

    def __init__(self, passing: Passing, link: Link, route: PeerRoute) -> None:
        self._passing = passing
        self._link = link
        self._route = route

    def message_received(self, data: bytes) -> None:
        self._passing.heard(self._link, self._route, data)

    def queue_low(self) -> None: ...

    def channel_closed(self) -> None: ...

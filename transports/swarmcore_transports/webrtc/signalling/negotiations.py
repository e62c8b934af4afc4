"""What comes by signalling: checked, and given to the exchange that it belongs to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import attrs

from swarmcore.errors import PeerIdentityError, SwarmError
from swarmcore.identity import Identity
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.signalling.client import absent
from swarmcore_transports.webrtc.signalling.messages import Absent, Envelope
from swarmcore_transports.webrtc.signalling.negotiation import Exchange, Route

MAX_ANSWERING = 64
"""Most offers that are being answered at a time; further ones are refused, or the oldest makes room."""

MAX_ANSWERING_PEER = 4
"""And of one peer."""

FAIR_SECONDS = 3.0
"""Seconds that an offer has for sure: peers that mean it are connected by then, most of them."""

_REMEMBERED = 4096


@attrs.define(eq=False)
class Answering:
    """An offer that is being answered."""

    peer: PeerId
    since: float
    give_up: Callable[[], object] = lambda: None
    """To be set by whoever answers it; called when it has to make room."""


@attrs.define
class Offers:
    """Keeps count. A plain object: whoever answers says when it begins and ends; ``now`` is passed in."""

    most: int = MAX_ANSWERING
    most_of_peer: int = MAX_ANSWERING_PEER
    _seen: dict[bytes, None] = attrs.field(factory=dict)  # the oldest first
    _answering: dict[Answering, None] = attrs.field(factory=dict)  # the oldest first

    def __len__(self) -> int:
        """How many are being answered."""
        return len(self._answering)

    def is_new(self, exchange: bytes) -> bool:
        """Whether this offer comes for the first time; it is remembered, among the latest 4096."""
        if exchange in self._seen:
            return False
        self._seen[exchange] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True

    def begin(self, peer: PeerId, now: float) -> Answering | None:
        """Begin to answer ``peer``; None when there are too many already, of it or of all.

        Of all, the oldest makes room if it has had its `FAIR_SECONDS`: those who never complete their offers
        would keep everybody else out.
        """
        if sum(one.peer == peer for one in self._answering) >= self.most_of_peer:
            return None
        if len(self) >= self.most:
            oldest = next(iter(self._answering))
            if now - oldest.since < FAIR_SECONDS:
                return None
            self.end(oldest)
            oldest.give_up()
        answering = Answering(peer, now)
        self._answering[answering] = None
        return answering

    def end(self, answering: Answering) -> None:
        """It was answered, or given up. Harmless when repeated."""
        self._answering.pop(answering, None)


logger = logging.getLogger(__name__)

_MOST_EARLY = 16
"""Envelopes of an exchange that may come before it has begun here."""

OnOffer = Callable[[Route, Envelope], None]


class Exchanges:
    """The exchanges under way, and those of living connections, by name.

    ``on_offer`` gets each offer once, and sees to it that its exchange begins or ends; ``on_restart`` gets
    each restart, whether or not there is such a connection. `counters` count what is
    dropped: ``forged``, ``repeated``, ``ignored``.
    """

    def __init__(
        self,
        identity: Identity,
        offers: Offers,
        counters: Counter[str],
        on_offer: OnOffer,
        on_restart: OnOffer,
    ) -> None:
        self._identity = identity
        self._offers = offers
        self._on_offer = on_offer
        self._on_restart = on_restart
        self._by_name: dict[bytes, Exchange] = {}
        self._early: dict[bytes, list[tuple[Route, Envelope]]] = {}
        self.counters = counters

    def __len__(self) -> int:
        return len(self._by_name)

    def begin(self, exchange: Exchange) -> None:
        """``exchange`` takes what comes under its name, in place of an earlier one of that name."""
        self._by_name[exchange.name] = exchange
        for route, envelope in self._early.pop(exchange.name, ()):
            self.signalled(route, envelope)

    def end(self, name: bytes) -> None:
        """What comes under ``name`` is ignored from now on. Harmless when repeated."""
        self._by_name.pop(name, None)
        self._early.pop(name, None)

    def signalled(self, route: Route, signal: Envelope | Absent) -> None:
        """``signal`` came by ``route``; nothing of it is proven yet."""
        exchange = self._by_name.get(signal.exchange)
        if isinstance(signal, Absent):
            if exchange and signal.receiver == exchange.peer:
                exchange.route_failed(route, absent(signal))
            return
        begins = signal.kind in ("offer", "restart")
        if exchange is None and not begins:  # not worth the price of a look at its signature
            early = self._early.get(signal.exchange)
            if early is None or len(early) >= _MOST_EARLY:
                self.counters["ignored"] += 1
            else:
                early.append((route, signal))
            return
        try:
            signal.check(self._identity.peer)
            if exchange and signal.sender != exchange.peer:
                raise PeerIdentityError(
                    f"dialled {short(exchange.peer)}, and {short(signal.sender)} answered; the address is "
                    f"out of date, or the signalling service misdirects"
                )
        except SwarmError as exc:
            self.counters["forged"] += 1
            logger.info("%r: %s", route, exc)
            if exchange:
                exchange.route_failed(route, exc)
            return
        if begins:
            self._begun(route, signal, exchange)
        elif exchange and not exchange.is_new(signal):
            self.counters["repeated"] += 1
        elif exchange:
            self._heard(signal, exchange)

    def _begun(self, route: Route, signal: Envelope, exchange: Exchange | None) -> None:
        if signal.sender == self._identity.peer or not self._offers.is_new(signal.signature):
            self.counters["repeated"] += 1
            if exchange:  # the peer tries another way: so does what is said to it
                exchange.add_route(route)
        elif signal.kind == "restart":
            self._on_restart(route, signal)
        elif exchange is None and signal.exchange not in self._early:
            self._early[signal.exchange] = []  # its candidates may come before there is a connection
            self._on_offer(route, signal)
        else:
            self.counters["ignored"] += 1

    def _heard(self, signal: Envelope, exchange: Exchange) -> None:
        if signal.kind == "candidate":
            self.counters["ignored"] += exchange.candidates_heard(signal.body)
        elif signal.kind == "refusal":
            exchange.refused(signal.body)
        elif not exchange.answered(signal.body):
            self.counters["ignored"] += 1

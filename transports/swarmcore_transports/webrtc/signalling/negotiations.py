"""What comes by signalling: checked, and given to the negotiation that it belongs to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import attrs

from swarmcore.errors import PeerIdentityError, SwarmError
from swarmcore.identity import Identity
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.signalling.client import unreachable
from swarmcore_transports.webrtc.signalling.messages import Absent, Envelope
from swarmcore_transports.webrtc.signalling.negotiation import Negotiation, Route

logger = logging.getLogger(__name__)

MAX_INCOMING_OFFERS = 64
"""Most offers that are being answered at a time; further ones are refused, or the oldest makes room."""

MAX_INCOMING_OFFERS_OF_PEER = 4
"""And of one peer."""

FAIR_SECONDS = 3.0
"""Seconds that an offer has for sure: most honest peers are connected by then."""

_REMEMBERED = 4096


@attrs.define(eq=False)
class IncomingOffer:
    """An offer that is being answered."""

    peer: PeerId
    since: float
    give_up: Callable[[], object] = lambda: None
    """To be set by whoever answers it; called when it has to make room."""


@attrs.define
class IncomingOffers:
    """Bounds how many are answered at a time. A plain object: whoever answers says when it begins and ends;
    ``now`` is passed in."""

    limit: int = MAX_INCOMING_OFFERS
    limit_of_peer: int = MAX_INCOMING_OFFERS_OF_PEER
    _seen: dict[bytes, None] = attrs.field(factory=dict)  # the oldest first
    _answering: dict[IncomingOffer, None] = attrs.field(factory=dict)  # the oldest first

    def __len__(self) -> int:
        """How many are being answered."""
        return len(self._answering)

    def is_new(self, signature: bytes) -> bool:
        """Whether this offer comes for the first time; it is remembered, among the latest 4096."""
        if signature in self._seen:
            return False
        self._seen[signature] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True

    def begin(self, peer: PeerId, now: float) -> IncomingOffer | None:
        """Begin to answer ``peer``; None when there are too many already, of it or of all.

        Of all, the oldest makes room if it has had its `FAIR_SECONDS`: those who never complete their offers
        would keep everybody else out.
        """
        if sum(one.peer == peer for one in self._answering) >= self.limit_of_peer:
            return None
        if len(self) >= self.limit:
            oldest = next(iter(self._answering))
            if now - oldest.since < FAIR_SECONDS:
                return None
            self.end(oldest)
            oldest.give_up()
        answering = IncomingOffer(peer, now)
        self._answering[answering] = None
        return answering

    def end(self, answering: IncomingOffer) -> None:
        """It was answered, or given up. Harmless when repeated."""
        self._answering.pop(answering, None)


_MAX_EARLY = 16
"""Envelopes of a negotiation that may come before it has begun here."""

OnOffer = Callable[[Route, Envelope], None]


class Negotiations:
    """The negotiations under way, and those of living connections, by id.

    ``on_offer`` gets each offer once, and sees to it that its negotiation begins or ends; ``on_restart`` gets
    each restart, whether or not there is such a connection. ``counters`` count what is dropped: ``forged``,
    ``repeated``, ``ignored``.
    """

    def __init__(
        self,
        identity: Identity,
        offers: IncomingOffers,
        counters: Counter[str],
        on_offer: OnOffer,
        on_restart: OnOffer,
    ) -> None:
        self._identity = identity
        self._offers = offers
        self._on_offer = on_offer
        self._on_restart = on_restart
        self._counters = counters
        self._by_id: dict[bytes, Negotiation] = {}
        self._early: dict[bytes, list[tuple[Route, Envelope]]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def begin(self, negotiation: Negotiation) -> None:
        """``negotiation`` takes what comes under its id, in place of an earlier one."""
        self._by_id[negotiation.id] = negotiation
        for route, envelope in self._early.pop(negotiation.id, ()):
            self.signalled(route, envelope)

    def end(self, negotiation_id: bytes) -> None:
        """What comes under this id is ignored from now on. Harmless when repeated."""
        self._by_id.pop(negotiation_id, None)
        self._early.pop(negotiation_id, None)

    def signalled(self, route: Route, signal: Envelope | Absent) -> None:
        """``signal`` came by ``route``; nothing of it is proven yet."""
        negotiation = self._by_id.get(signal.exchange)
        if isinstance(signal, Absent):
            if negotiation and signal.receiver == negotiation.peer:
                negotiation.route_failed(route, unreachable(signal))
            return
        begins = signal.kind in ("offer", "restart")
        if negotiation is None and not begins:  # not worth the price of a look at its signature
            early = self._early.get(signal.exchange)
            if early is None or len(early) >= _MAX_EARLY:
                self._counters["ignored"] += 1
            else:
                early.append((route, signal))
            return
        try:
            signal.check(self._identity.peer)
            if negotiation and signal.sender != negotiation.peer:
                raise PeerIdentityError(
                    f"dialled {short(negotiation.peer)}, and {short(signal.sender)} answered; the address is "
                    f"out of date, or the signalling service misdirects"
                )
        except SwarmError as exc:
            self._counters["forged"] += 1
            logger.info("%r: %s", route, exc)
            if negotiation:
                negotiation.route_failed(route, exc)
            return
        if begins:
            self._take_offer(route, signal, negotiation)
        elif negotiation and not negotiation.is_new(signal):
            self._counters["repeated"] += 1
        elif negotiation:
            self._take_reply(signal, negotiation)

    def _take_offer(self, route: Route, offer: Envelope, negotiation: Negotiation | None) -> None:
        if offer.sender == self._identity.peer or not self._offers.is_new(offer.signature):
            self._counters["repeated"] += 1
            if negotiation:  # the peer tries another route: so do the replies to it
                negotiation.add_route(route)
        elif offer.kind == "restart":
            self._on_restart(route, offer)
        elif negotiation is None and offer.exchange not in self._early:
            self._early[offer.exchange] = []  # its candidates may come before there is a connection
            self._on_offer(route, offer)
        else:
            self._counters["ignored"] += 1

    def _take_reply(self, reply: Envelope, negotiation: Negotiation) -> None:
        if reply.kind == "candidate":
            self._counters["ignored"] += negotiation.take_candidates(reply.body)
        elif reply.kind == "refusal":
            negotiation.take_refusal(reply.body)
        elif not negotiation.take_answer(reply.body):
            self._counters["ignored"] += 1

"""One offer, its answer and the candidates of both sides, by whatever routes the peer is reached."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol

import attrs

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.identity import Identity
from swarmcore.printable import printable_line
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.engine import PeerConnection
from swarmcore_transports.webrtc.sdp import MAX_CANDIDATES
from swarmcore_transports.webrtc.signalling.messages import NO_MORE, Envelope, Kind, sealed

logger = logging.getLogger(__name__)

MAX_ROUTES = 8
"""Most ways by which the envelopes of one exchange go."""

_FURTHER_SECONDS = 0.7
"""How long the answer to an offer is waited for before it goes by further routes as well."""

_LONGEST_CANDIDATE = 512


class Route(Protocol):
    """What passes envelopes to a peer: a signalling service, or a third peer."""

    async def send(self, envelope: Envelope) -> None:
        """Hand it on. Raise `PeerUnreachableError` when that cannot be done."""


@attrs.define(eq=False)
class _Told:
    """How much went by one route."""

    route: Route
    count: int = 0
    busy: bool = False


class Exchange:
    """What both sides say to make ``connection``, or a new path for it, under one ``name``.

    All that this side says goes by every route, in order. What comes has been checked before: it is from
    ``peer``, for this exchange. ``further`` gives more routes when those there are do not lead to an answer.
    """

    def __init__(
        self,
        identity: Identity,
        peer: PeerId,
        name: bytes,
        connection: PeerConnection,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
        further: Callable[[], Sequence[Route]] = tuple,
    ) -> None:
        self.peer = peer
        self.name = name
        self.connection = connection
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The peer's description, for the side that made the offer."""
        self._identity = identity
        self._in_background = in_background
        self._further: Callable[[], Sequence[Route]] | None = further
        self._routes: list[_Told] = []
        self._said: list[Envelope] = []
        self._found: list[str] = []
        self._failure: SwarmError | None = None
        self._known: set[bytes] = set()
        self._heard: list[str] = []
        self._heard_count = 0
        self._described = False
        self._taking = False
        connection.on_candidate = self._candidate_found

    def __repr__(self) -> str:
        heard = f"{self._heard_count} candidates heard"
        return f"<Exchange with {short(self.peer)} · {len(self._said)} said · {heard}>"

    async def agree(self, kind: Literal["offer", "restart"], offer: str, route: Route) -> None:
        """Send ``offer`` by ``route``, by the further ones too if no answer comes soon, and take the answer.

        Raise the `SwarmError` that says why there is none, and what `PeerConnection.accept` raises.
        """
        self.say(kind, offer)
        self.add_route(route)
        widening = asyncio.get_running_loop().call_later(_FURTHER_SECONDS, self.widen)
        try:
            answer = await self.answer
        finally:
            widening.cancel()
        await self.connection.accept(answer)
        self.peer_described()

    async def answer_offer(self, offer: str, route: Route) -> None:
        """Take ``offer`` and send the answer by ``route``. Raise what `PeerConnection.answer` raises."""
        self.add_route(route)
        self.say("answer", await self.connection.answer(offer))
        self.peer_described()

    # --- out ------------------------------------------------------------------------------------------

    def say(self, kind: Literal["offer", "restart", "answer"], description: str) -> None:
        """Send this side's description; its further candidates follow by themselves."""
        self._append(kind, description)
        self._say_found()

    def add_route(self, route: Route) -> None:
        """Say everything by ``route``, too, unless it is known or there are `MAX_ROUTES`."""
        if len(self._routes) < MAX_ROUTES and all(told.route is not route for told in self._routes):
            told = _Told(route)
            self._routes.append(told)
            self._in_background(self._tell(told))

    def widen(self) -> None:
        """Take the further routes as well; done once."""
        further, self._further = self._further, None
        for route in further() if further and not self.answer.done() else ():
            self.add_route(route)

    def route_failed(self, route: Route, error: SwarmError) -> None:
        """Nothing comes of ``route``. Without any other, nor further ones, the answer is ``error``."""
        self._failure = self._failure or error
        self._routes = [told for told in self._routes if told.route is not route]
        if not self._routes:
            self.widen()
        if not self._routes:
            self.fail(self._failure)

    def _candidate_found(self, candidate: str) -> None:
        self._found.append(candidate or NO_MORE)
        if self._said and len(self._found) == 1:  # those found at the same moment go together
            asyncio.get_running_loop().call_soon(self._say_found)

    def _say_found(self) -> None:
        found, self._found = self._found, []
        if found:
            self._append("candidate", "\n".join(found))

    def _append(self, kind: Kind, body: str) -> None:
        self._said.append(sealed(self._identity, self.peer, self.name, kind, body))
        for told in self._routes:
            self._in_background(self._tell(told))

    async def _tell(self, told: _Told) -> None:
        if told.busy:
            return
        told.busy = True
        try:
            while told.count < len(self._said):
                await told.route.send(self._said[told.count])
                told.count += 1
        except SwarmError as exc:
            logger.debug("%r: %s", self, exc)
            self.route_failed(told.route, exc)
        finally:
            told.busy = False

    # --- in -------------------------------------------------------------------------------------------

    def fail(self, error: SwarmError) -> None:
        """There will be no answer."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # seen here: the dial may have been given up

    def is_new(self, envelope: Envelope) -> bool:
        """Whether ``envelope`` comes for the first time: each goes by several routes."""
        known = envelope.signature in self._known
        if len(self._known) < 4 * MAX_CANDIDATES:
            self._known.add(envelope.signature)
        return not known

    def answered(self, description: str) -> bool:
        """The peer's answer; False when there was one already."""
        if self.answer.done():
            return False
        self.answer.set_result(description)
        return True

    def refused(self, reason: str) -> None:
        """The peer's refusal."""
        self.fail(PeerUnreachableError(f"{short(self.peer)} refuses: {printable_line(reason, 200)}"))

    def candidates_heard(self, body: str) -> int:
        """Give the peer's candidates to the connection; return how many were too many, or too long."""
        lines = body.splitlines()
        taken = [line for line in lines if len(line) <= _LONGEST_CANDIDATE]
        taken = taken[: max(0, MAX_CANDIDATES + 1 - self._heard_count)]
        self._heard_count += len(taken)
        self._heard += ["" if line == NO_MORE else line for line in taken]
        self._take_heard()
        return len(lines) - len(taken)

    def peer_described(self) -> None:
        """The connection has the peer's description: it takes candidates from now on."""
        self._described = True
        self._take_heard()

    def _take_heard(self) -> None:
        if self._described and self._heard and not self._taking:
            self._taking = True
            self._in_background(self._take())

    async def _take(self) -> None:
        try:
            while self._heard:
                await self.connection.add_candidate(self._heard.pop(0))
        finally:
            self._taking = False

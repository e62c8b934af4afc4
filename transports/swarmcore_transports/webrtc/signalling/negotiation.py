"""One offer, its answer and the candidates of both sides, by whatever routes the peer is reached."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import attrs

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.identity import Identity
from swarmcore.printable import printable_line
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.engine import PeerConnection
from swarmcore_transports.webrtc.sdp import MAX_CANDIDATES
from swarmcore_transports.webrtc.signalling.messages import (
    END_OF_CANDIDATES,
    Envelope,
    SignalKind,
    signed_envelope,
)

logger = logging.getLogger(__name__)

MAX_ROUTES = 8
"""Most routes by which the envelopes of one negotiation go."""

_FURTHER_SECONDS = 0.7
"""How long the answer to an offer is waited for before it goes by further routes as well."""

_MAX_CANDIDATE_LENGTH = 512


class Route(Protocol):
    """What passes envelopes to a peer: a signalling service, or a third peer."""

    async def send(self, envelope: Envelope) -> None:
        """Hand it on. Raise `PeerUnreachableError` when that cannot be done."""


@attrs.define(eq=False)
class _RouteState:
    """How much went by one route."""

    route: Route
    count: int = 0
    sending: bool = False


class Negotiation:
    """What both sides send to make ``connection``, or a new path for it, under one ``id``.

    Candidates trickle (RFC 8838): each side sends its description with those it knows at once, and the others
    as they are found. All that this side sends goes by every route, in order. What comes has been checked
    before: it is from ``peer``, for this negotiation. ``further`` gives more routes when those there are do
    not lead to an answer.
    """

    def __init__(
        self,
        identity: Identity,
        peer: PeerId,
        id: bytes,
        connection: PeerConnection,
        tasks: BackgroundTasks,
        further: Callable[[], Sequence[Route]] = tuple,
    ) -> None:
        self.peer = peer
        self.id = id
        self.connection = connection
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The peer's description, for the side that made the offer."""
        self._identity = identity
        self._tasks = tasks
        self._further: Callable[[], Sequence[Route]] | None = further
        self._routes: list[_RouteState] = []
        self._sent: list[Envelope] = []
        self._local_candidates: list[str] = []  # found and not sent
        self._failure: SwarmError | None = None
        self._known_signatures: set[bytes] = set()
        self._remote_candidates: list[str] = []  # received and not given to the connection
        self._remote_count = 0
        self._remote_described = False
        self._adding = False
        connection.on_candidate = self._candidate_found

    def __repr__(self) -> str:
        received = f"{self._remote_count} candidates received"
        return f"<Negotiation with {short(self.peer)} · {len(self._sent)} sent · {received}>"

    async def offer(self, kind: Literal["offer", "restart"], description: str, route: Route) -> None:
        """Send an offer by ``route``, by the further ones too if no answer comes soon, and take the answer.

        Raise the `SwarmError` that says why there is none, and what `PeerConnection.accept` raises.
        """
        self._send_description(kind, description)
        self.add_route(route)
        later = asyncio.get_running_loop().call_later(_FURTHER_SECONDS, self._add_further_routes)
        try:
            answer = await self.answered
        finally:
            later.cancel()
        await self.connection.accept(answer)
        self._remote_is_described()

    async def answer(self, offer: str, route: Route) -> None:
        """Take ``offer`` and send the answer by ``route``. Raise what `PeerConnection.answer` raises."""
        self.add_route(route)
        self._send_description("answer", await self.connection.answer(offer))
        self._remote_is_described()

    # --- out ------------------------------------------------------------------------------------------

    def _send_description(self, kind: Literal["offer", "restart", "answer"], description: str) -> None:
        """Further candidates follow by themselves."""
        self._append(kind, description)
        self._send_candidates()

    def add_route(self, route: Route) -> None:
        """Send everything by ``route``, too, unless it is known or there are `MAX_ROUTES`."""
        if len(self._routes) < MAX_ROUTES and all(state.route is not route for state in self._routes):
            state = _RouteState(route)
            self._routes.append(state)
            self._tasks.start(self._send_by(state), f"signalling to {short(self.peer)}")

    def _add_further_routes(self) -> None:
        """Done once."""
        further, self._further = self._further, None
        for route in further() if further and not self.answered.done() else ():
            self.add_route(route)

    def route_failed(self, route: Route, error: SwarmError) -> None:
        """Nothing comes of ``route``. Without any other, nor further ones, the answer is ``error``."""
        self._failure = self._failure or error
        self._routes = [state for state in self._routes if state.route is not route]
        if not self._routes:
            self._add_further_routes()
        if not self._routes:
            self._fail(self._failure)

    def _candidate_found(self, candidate: str) -> None:
        self._local_candidates.append(candidate or END_OF_CANDIDATES)
        if self._sent and len(self._local_candidates) == 1:  # those found at the same moment go together
            asyncio.get_running_loop().call_soon(self._send_candidates)

    def _send_candidates(self) -> None:
        candidates, self._local_candidates = self._local_candidates, []
        if candidates:
            self._append("candidate", "\n".join(candidates))

    def _append(self, kind: SignalKind, body: str) -> None:
        self._sent.append(signed_envelope(self._identity, self.peer, self.id, kind, body))
        for state in self._routes:
            self._tasks.start(self._send_by(state), f"signalling to {short(self.peer)}")

    async def _send_by(self, state: _RouteState) -> None:
        if state.sending:
            return
        state.sending = True
        try:
            while state.count < len(self._sent):
                await state.route.send(self._sent[state.count])
                state.count += 1
        except SwarmError as exc:
            logger.debug("%r: %s", self, exc)
            self.route_failed(state.route, exc)
        finally:
            state.sending = False

    # --- in -------------------------------------------------------------------------------------------

    def is_new(self, envelope: Envelope) -> bool:
        """Whether ``envelope`` comes for the first time: each goes by several routes."""
        known = envelope.signature in self._known_signatures
        if len(self._known_signatures) < 4 * MAX_CANDIDATES:
            self._known_signatures.add(envelope.signature)
        return not known

    def take_answer(self, description: str) -> bool:
        """The peer's answer; False when there was one already."""
        if self.answered.done():
            return False
        self.answered.set_result(description)
        return True

    def take_refusal(self, reason: str) -> None:
        """The peer's refusal."""
        self._fail(PeerUnreachableError(f"{short(self.peer)} refuses: {printable_line(reason, 200)}"))

    def _fail(self, error: SwarmError) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)
            self.answered.exception()  # seen here: the dial may have been given up

    def take_candidates(self, body: str) -> int:
        """Give the peer's candidates to the connection; return how many were too many, or too long."""
        lines = body.splitlines()
        taken = [line for line in lines if len(line) <= _MAX_CANDIDATE_LENGTH]
        taken = taken[: max(0, MAX_CANDIDATES + 1 - self._remote_count)]
        self._remote_count += len(taken)
        self._remote_candidates += ["" if line == END_OF_CANDIDATES else line for line in taken]
        self._add_remote_candidates()
        return len(lines) - len(taken)

    def _remote_is_described(self) -> None:
        """The connection has the peer's description: it takes candidates from now on."""
        self._remote_described = True
        self._add_remote_candidates()

    def _add_remote_candidates(self) -> None:
        if self._remote_described and self._remote_candidates and not self._adding:
            self._adding = True
            self._tasks.start(self._add_one_by_one(), f"candidates of {short(self.peer)}")

    async def _add_one_by_one(self) -> None:
        try:
            while self._remote_candidates:
                await self.connection.add_candidate(self._remote_candidates.pop(0))
        finally:
            self._adding = False

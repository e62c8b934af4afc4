"""The signalling service: passes envelopes between the peers that are connected to it, and keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections import Counter
from collections.abc import Collection

import attrs
from aiohttp import WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError

from swarmcore.errors import (
    PeerNotAllowedError,
    ProtocolError,
    ResourceLimitError,
    SwarmError,
)
from swarmcore.pacing import TokenBucket
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.addresses import PATH, ServiceAddress
from swarmcore_transports.webrtc.signalling.messages import (
    MAX_SIGNAL,
    NONCE_BYTES,
    REPLACED,
    Absent,
    Challenge,
    Envelope,
    Register,
    Registered,
    Signal,
    decode,
    encode,
    registered_peer,
)
from swarmcore_transports.webrtc.signalling.sockets import SignallingSockets, accepted

logger = logging.getLogger(__name__)

_http_logger = logger.getChild("http")
_http_logger.addFilter(lambda record: not _is_noise(record))

_HEARTBEAT = 20.0
_SEND_TIMEOUT = 5.0
_REFUSED = 4003


@attrs.frozen
class ServiceLimits:
    """What one signalling service bears."""

    peers: int = 10_000
    """Peers connected at a time."""
    rate: float = 20.0
    """Envelopes a second that one peer may send, on average."""
    burst: float = 200.0
    """And at once: a negotiation with many candidates, several times over."""
    waiting: int = 256
    """Envelopes that wait for one slow peer; for a further one the sender hears that it is absent. What waits
    is counted among the sender's bytes, too."""
    proof_timeout: float = 10.0
    """Seconds in which a connected peer has to prove who it is, and before that to ask for a connection."""


@attrs.define(eq=False)
class _Registration:
    """A connected peer: its socket, and what waits to be sent to it."""

    peer: PeerId
    socket: web.WebSocketResponse
    waiting: asyncio.Queue[tuple[Signal, Reservation | None]]
    limit: TokenBucket

    def put(self, signal: Signal, held: Reservation | None = None) -> None:
        """Send ``signal`` when its turn comes, and release ``held``. Raise asyncio.QueueFull."""
        self.waiting.put_nowait((signal, held))

    def forget_waiting(self) -> None:
        """It takes nothing any more."""
        while not self.waiting.empty():
            _, held = self.waiting.get_nowait()
            if held is not None:
                held.release()


class SignallingService:
    """Peers connect by WebSocket at ``/swarmcore/signalling/1``; of one peer, the last connection counts.

    What a peer sends faster than its rate is dropped and counted in `counters`; ``owner``, who runs the
    service, has none: strangers decide how much it has to answer.
    """

    def __init__(
        self,
        limits: ServiceLimits | None = None,
        resources: ResourceManager | None = None,
        owner: PeerId | None = None,
    ) -> None:
        self._owner = owner
        self._limits = limits or ServiceLimits()
        self._resources = resources or ResourceManager()
        self._sockets: SignallingSockets | None = None
        self._peers: dict[PeerId, _Registration] = {}
        self._allowed: frozenset[PeerId] | None = None
        self._runner: web.AppRunner | None = None
        self.counters: Counter[str] = Counter()
        """What happened since the start, by name: registered, passed, absent, dropped, refused."""

    def __repr__(self) -> str:
        return f"<SignallingService {len(self._peers)} peers · {self.counters['passed']} passed>"

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Let no others register from now on."""
        self._allowed = frozenset(peers)

    async def start(self, place: ServiceAddress, tls: ssl.SSLContext | None = None) -> ServiceAddress:
        """Listen at ``place`` and return where that is, its port found.

        Raise `AddressInUseError` or `AddressError` when it cannot be listened on.
        """
        application = web.Application()
        application.router.add_get(PATH, self._connected)
        self._runner = web.AppRunner(
            application, access_log=None, logger=_http_logger, handle_signals=False, shutdown_timeout=1.0
        )
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._sockets = SignallingSockets(self._resources, server, 2 * self._limits.proof_timeout, tls)
        try:
            port = await self._sockets.listen(place.endpoint)
        except BaseException:
            await self.close()
            raise
        return attrs.evolve(place, port=port, tls=tls is not None)

    async def close(self) -> None:
        """Hang up on everybody. Harmless when repeated."""
        if self._sockets:
            self._sockets.close()
        for registration in tuple(self._peers.values()):
            await registration.socket.close()
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    # --- one connection -------------------------------------------------------------------------------

    async def _connected(self, request: web.Request) -> web.StreamResponse:
        if len(self._peers) >= self._limits.peers:
            self.counters["refused"] += 1
            raise web.HTTPServiceUnavailable(reason="this signalling service is full")
        counted = accepted(request.transport)
        if counted is None:
            raise web.HTTPServiceUnavailable(reason="the connection is gone")
        socket = web.WebSocketResponse(heartbeat=_HEARTBEAT, max_msg_size=MAX_SIGNAL)
        await socket.prepare(request)
        try:
            peer = await self._proven(socket)
            counted.prove(peer)
        except (SwarmError, TimeoutError) as exc:
            self.counters["refused"] += 1
            await socket.close(code=_REFUSED, message=str(exc).encode()[:120] or b"too slow")
            return socket
        limit = TokenBucket(self._limits.rate, self._limits.burst)
        registration = _Registration(peer, socket, asyncio.Queue(self._limits.waiting), limit)
        before, self._peers[peer] = self._peers.get(peer), registration
        if before:
            await before.socket.close(code=REPLACED, message=b"the peer has connected again")
        self.counters["registered"] += 1
        sender = asyncio.create_task(self._send_waiting(registration))
        try:
            registration.put(Registered())
            await self._receive(registration)
        finally:
            sender.cancel()
            if self._peers.get(peer) is registration:
                del self._peers[peer]
            registration.forget_waiting()
            await socket.close()
        return socket

    async def _proven(self, socket: web.WebSocketResponse) -> PeerId:
        """Let the peer sign a challenge. Raise a `SwarmError` or TimeoutError when it is not let in."""
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            async with asyncio.timeout(self._limits.proof_timeout):
                await socket.send_str(encode(Challenge(nonce)))
                message = await socket.receive()
            if message.type is not WSMsgType.TEXT:
                raise ProtocolError("the peer did not register")
            register = decode(message.data)
            if not isinstance(register, Register):
                raise ProtocolError("the peer did not register first")
            peer = registered_peer(register, nonce)
            if self._allowed is not None and peer not in self._allowed:
                raise PeerNotAllowedError("this swarm is closed; ask its owner to allow this peer")
            return peer
        except ConnectionError as exc:
            raise ProtocolError("the peer hung up") from exc

    async def _receive(self, registration: _Registration) -> None:
        loop = asyncio.get_running_loop()
        async for message in registration.socket:
            fits = registration.peer == self._owner or registration.limit.take(loop.time())
            if message.type is not WSMsgType.TEXT or not fits:
                self.counters["dropped"] += 1
                continue
            try:
                envelope = decode(message.data)
            except ProtocolError as exc:
                self.counters["dropped"] += 1
                logger.debug("%s: %s", short(registration.peer), exc)
                continue
            if not (
                isinstance(envelope, Envelope)
                and envelope.sender == registration.peer
                and envelope.is_possible
            ):
                self.counters["dropped"] += 1
                continue
            self._pass(envelope, registration)

    def _pass(self, envelope: Envelope, sender: _Registration) -> None:
        receiver = self._peers.get(PeerId(envelope.receiver))
        try:
            if receiver is None:
                raise LookupError("it is not connected to this signalling service")
            if receiver.waiting.full():
                raise LookupError("it gets more than it can take")
            held = self._resources.reserve(
                sender.peer, Resource.BYTES, envelope.nbytes, priority=Priority.LOW
            )
            receiver.put(envelope, held)
            self.counters["passed"] += 1
        except (LookupError, ResourceLimitError) as exc:
            self.counters["absent"] += 1
            reason = str(exc) if isinstance(exc, LookupError) else "too much waits here"
            with contextlib.suppress(asyncio.QueueFull):
                sender.put(Absent(envelope.receiver, envelope.exchange, reason))

    async def _send_waiting(self, registration: _Registration) -> None:
        """Send to a peer what waits for it; one that does not take it in time is hung up on."""
        try:
            while True:
                signal, held = await registration.waiting.get()
                with held or contextlib.nullcontext():
                    async with asyncio.timeout(_SEND_TIMEOUT):
                        await registration.socket.send_str(encode(signal))
        except (ConnectionError, TimeoutError) as exc:
            logger.debug("%s is gone: %r", short(registration.peer), exc)
            await registration.socket.close()


def _is_noise(record: logging.LogRecord) -> bool:
    """Whether it is the traceback of what anybody could fill the log with: no request, or hanging up."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, HttpProcessingError | ConnectionError)

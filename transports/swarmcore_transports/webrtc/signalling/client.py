"""A peer's connection to a signalling service, made anew whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable

import aiohttp

from swarmcore.errors import PeerUnreachableError, ProtocolError, SwarmError
from swarmcore.identity import Identity
from swarmcore.pacing import Backoff, TokenBucket
from swarmcore.printable import printable_line
from swarmcore.tasks import cancel_and_wait, wait_until_set
from swarmcore.types import PeerId, short
from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.signalling.messages import (
    MAX_SIGNAL,
    REPLACED,
    Absent,
    Challenge,
    Envelope,
    Registered,
    Signal,
    decode,
    decode_forwarded,
    encode,
    registration,
)

logger = logging.getLogger(__name__)

_HEARTBEAT = 20.0
_HANGING_UP = aiohttp.ClientWSTimeout(ws_close=1.0)
_RATE, _BURST = 200.0, 1000.0
_RETRY_SECONDS = (0.5, 30.0)
_SEND_TIMEOUT = 5.0
_ENDS = {
    aiohttp.WSMsgType.CLOSE,
    aiohttp.WSMsgType.CLOSING,
    aiohttp.WSMsgType.CLOSED,
    aiohttp.WSMsgType.ERROR,
}

OnSignal = Callable[["SignallingClient", Envelope | Absent], None]
"""Told what comes; the signatures of envelopes are yet to be checked."""


class SignallingClient:
    """Registers ``identity`` at ``service``; `run` keeps that up until it is cancelled.

    ``tls`` says whose certificates to believe: True those that the system does, False all. ``on_hung_up`` is
    called when the service is gone. What comes faster than it can be looked at is dropped and counted in
    ``counters`` as ``overflow``.
    """

    def __init__(
        self,
        identity: Identity,
        service: ServiceAddress,
        on_signal: OnSignal,
        *,
        timeout: float,
        tls: ssl.SSLContext | bool = True,
        on_hung_up: Callable[[ServiceAddress], None] = lambda service: None,
        rng: random.Random,
        counters: Counter[str],
    ) -> None:
        self.service = service
        self._identity = identity
        self._on_signal = on_signal
        self._timeout = timeout
        self._tls = tls
        self._on_hung_up = on_hung_up
        self._rng = rng
        self._counters = counters
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._registered = asyncio.Event()
        self._failure: SwarmError | None = None
        self._failed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._failed_at = 0.0
        self._replaced = False
        self._connecting: asyncio.Task[None] | None = None
        self._limit = TokenBucket(_RATE, _BURST)

    def __repr__(self) -> str:
        return f"<SignallingClient {self.service} {'registered' if self.registered else 'away'}>"

    @property
    def registered(self) -> bool:
        return self._registered.is_set()

    async def run(self) -> None:
        """Connect, again and again."""
        backoff = Backoff(*_RETRY_SECONDS)
        while True:
            self._connecting = asyncio.create_task(self._connect())
            try:
                await asyncio.wait([self._connecting])
                if not self._connecting.cancelled():
                    self._connecting.result()
            except (aiohttp.ClientError, OSError, TimeoutError, SwarmError) as exc:
                reason = _reason(exc) or f"no answer within {self._timeout:g} s"
                self._failure = PeerUnreachableError(f"signalling service {self.service}: {reason}")
                self._failed_at = asyncio.get_running_loop().time()
                self._failed.set()
                logger.debug("%s", self._failure)
            finally:
                self._connecting.cancel()
                await asyncio.wait([self._connecting])
            if self._replaced:
                logger.warning(
                    "another program meets its peers at %s under the identity of this one, %s; give each an "
                    "identity of its own",
                    self.service,
                    self._identity.peer,
                )
            elif self.registered:  # it was there until now, and may be back soon
                backoff.reset()
                self._on_hung_up(self.service)
            self._registered.clear()
            self._replaced = False
            await wait_until_set(self._wanted, backoff.next(self._rng))
            self._wanted.clear()

    def reconnect(self) -> None:
        """Connect anew at once: this machine has other addresses than before."""
        self._wanted.set()
        if self._connecting:
            self._connecting.cancel()

    async def ready(self) -> None:
        """Wait until registered. Raise `PeerUnreachableError` when an attempt just failed, or the next does.

        Between attempts, the next one is made at once.
        """
        if self.registered:
            return
        if self._failed.is_set() and asyncio.get_running_loop().time() - self._failed_at > _RETRY_SECONDS[0]:
            self._failed.clear()
            self._wanted.set()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._registered, self._failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*waits)
        if not self.registered and self._failure:
            raise PeerUnreachableError(self._failure.message)

    async def send(self, envelope: Envelope) -> None:
        """Hand ``envelope`` to the service. Raise `PeerUnreachableError` when it does not take it."""
        await self.ready()
        assert self._socket
        try:
            async with asyncio.timeout(_SEND_TIMEOUT):
                await self._socket.send_str(encode(envelope))
        except (ConnectionError, TimeoutError, aiohttp.ClientError) as exc:
            raise PeerUnreachableError(f"signalling service {self.service} is gone: {exc}") from exc

    async def _connect(self) -> None:
        timeout = aiohttp.ClientTimeout(sock_connect=self._timeout)
        tracing = aiohttp.TraceConfig()
        tracing.on_request_redirect.append(_refuse_redirect)
        async with aiohttp.ClientSession(timeout=timeout, trace_configs=[tracing]) as session:
            async with asyncio.timeout(self._timeout) as deadline:
                connecting = session.ws_connect(
                    self.service.url,
                    heartbeat=_HEARTBEAT,
                    timeout=_HANGING_UP,
                    max_msg_size=MAX_SIGNAL,
                    ssl=self._tls,
                )
                async with connecting as socket:
                    await self._register(socket)
                    deadline.reschedule(None)
                    self._socket = socket
                    self._failed.clear()
                    self._failure = None
                    self._registered.set()
                    await self._receive(socket)

    async def _register(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        challenge = await self._next(socket)
        if not isinstance(challenge, Challenge):
            raise ProtocolError("it does not begin with a challenge")
        await socket.send_str(encode(registration(self._identity, challenge)))
        if not isinstance(await self._next(socket), Registered):
            raise ProtocolError("it does not take the registration")

    async def _next(self, socket: aiohttp.ClientWebSocketResponse) -> Signal:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ProtocolError(f"it hung up: {message.extra or message.type.name.lower()}")
        return decode(message.data)

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await socket.receive()
            if message.type in _ENDS:
                self._replaced = message.data == REPLACED
                raise ProtocolError(f"it hung up{f': {message.extra}' if message.extra else ''}")
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            if not self._limit.take(loop.time()):
                self._counters["overflow"] += 1
                continue
            try:
                signal = decode_forwarded(message.data)
            except SwarmError as exc:
                logger.info("dropped what came from signalling service %s: %s", self.service, exc)
                continue
            self._on_signal(self, signal)


def unreachable(signal: Absent) -> PeerUnreachableError:
    """What an `Absent` means to whoever dials."""
    return PeerUnreachableError(
        f"{short(PeerId(signal.receiver))} cannot be reached by signalling: "
        f"{printable_line(signal.reason, 200)}"
    )


def _reason(exc: Exception) -> str:
    """What aiohttp says without the parameters it was called with."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not to be believed: {exc.certificate_error}"
    if isinstance(exc, aiohttp.ClientConnectorError):
        error = exc.os_error  # asyncio puts its own words in it, such as "Connect call failed"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        return f"it cannot be connected to: {reason}"
    return str(exc)


async def _refuse_redirect(*_: object) -> None:
    """Followed, a service that others name could have us fetch from anywhere in our own network."""
    raise ProtocolError("it redirects elsewhere")

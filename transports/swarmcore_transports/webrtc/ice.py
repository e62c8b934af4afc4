"""STUN and TURN servers: how they are written, and which of several a connection uses."""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import logging
import re
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Literal

import attrs
from aioice import stun

from swarmcore.errors import AddressError
from swarmcore.tasks import cancel_and_wait

logger = logging.getLogger(__name__)

CREDENTIAL_SECONDS = 12 * 3600
"""How long a time-limited TURN credential holds; a TURN server asks for it again all along a connection."""

PROBE_SECONDS = 1.5
"""How long servers are waited for, to see which of them answer."""

_PROBE_AGAIN = 60.0
_RETRANSMIT_SECONDS = (0.0, 0.2, 0.4, 0.8)

_FORM = "stun:HOST:PORT, turn:USER:PASSWORD@HOST:PORT or turn-secret:SECRET@HOST:PORT"
_PLACE = re.compile(
    r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?(?:\?transport=(?P<transport>udp|tcp))?"
)
_PORTS = {"stun": 3478, "turn": 3478, "turns": 5349}


@attrs.frozen
class IceServer:
    """A STUN or TURN server, with what it takes to use it."""

    scheme: Literal["stun", "turn", "turns"]
    host: str
    """A name or a literal address, IPv6 without brackets."""
    port: int
    transport: Literal["udp", "tcp"] = "udp"
    """How it is reached; what a TURN server relays is UDP in any case."""
    user: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    secret: str | None = attrs.field(default=None, repr=False)
    """Shared with the TURN server (coturn's ``use-auth-secret``): each connection gets its own login."""

    @classmethod
    def parse(cls, text: str) -> IceServer:
        """Read ``stun:host:port``, ``turn:user:password@host:port`` or ``turn-secret:secret@host:port``.

        ``turns`` and ``turns-secret`` are TURN over TLS; ``?transport=tcp`` may follow the port of TURN, the
        port may be left out. A literal IPv6 address is in brackets: ``stun:[2001:db8::1]:3478``. A password
        may have any characters, a user name no colon. Raise `AddressError`, which does not repeat
        credentials, on all else.
        """
        kind, _, rest = text.strip().partition(":")
        login, at, place = rest.rpartition("@")
        scheme = kind.removesuffix("-secret")
        match = _PLACE.fullmatch(place)
        shown = f"{kind}:{'…@' if at else ''}{place}"
        if scheme not in _PORTS or (kind != scheme and scheme == "stun"):
            raise AddressError(f"an ICE server must be {_FORM}; what was given is none of them")
        if place.count(":") > 1 and "[" not in place:
            raise AddressError(f"{shown!r}: an IPv6 address goes in brackets, as in [2001:db8::1]:3478")
        host = match["host"].strip("[]") if match else ""
        if match and match["host"] != host and not _is_ipv6(host):
            raise AddressError(f"{shown!r}: {host!r} is not an IPv6 address")
        if not match or not 0 < int(match["port"] or _PORTS[scheme]) < 65536:
            raise AddressError(f"{shown!r} is not an ICE server; expected {_FORM}")
        user: str | None = None
        password: str | None = None
        secret: str | None = None
        if scheme == "stun":
            if at or match["transport"]:
                raise AddressError(f"{shown!r}: a STUN server takes no credentials and no transport")
        elif kind != scheme:
            secret = login
            if not secret:
                raise AddressError(f"{shown!r} lacks its secret; expected {kind}:SECRET@HOST:PORT")
        else:
            user, _, password = login.partition(":")
            if not user or not password:
                raise AddressError(f"{shown!r} lacks its login; expected {kind}:USER:PASSWORD@HOST:PORT")
        transport = match["transport"] or ("tcp" if scheme == "turns" else "udp")
        if scheme == "turns" and transport != "tcp":
            raise AddressError(f"{shown!r}: TURN over TLS needs TCP")
        port = int(match["port"] or _PORTS[scheme])
        return cls(scheme, host, port, transport, user, password, secret)  # type: ignore[arg-type]

    @property
    def relays(self) -> bool:
        return self.scheme != "stun"

    @property
    def url(self) -> str:
        """As in RFC 7064 and 7065."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        place = f"{self.scheme}:{host}:{self.port}"
        return f"{place}?transport={self.transport}" if self.relays else place

    def __str__(self) -> str:
        return self.url

    def with_login(self, now: float) -> IceServer:
        """With time-limited credentials in place of the secret, if it has one; ``now`` in Unix time."""
        if self.secret is None:
            return self
        user = f"{int(now) + CREDENTIAL_SECONDS}:swarmcore"
        digest = hmac.digest(self.secret.encode(), user.encode(), "sha1")
        return attrs.evolve(self, user=user, password=base64.b64encode(digest).decode(), secret=None)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


class IceServers:
    """Chooses one STUN and one TURN server for each connection: aiortc takes no more at a time.

    Of several, the first of each kind that answers; who does is asked once a minute, when one is needed. A
    silent one would cost each connection five seconds.
    """

    def __init__(self, servers: Sequence[IceServer | str], *, clock: Callable[[], float] = time.time) -> None:
        self._servers = tuple(IceServer.parse(one) if isinstance(one, str) else one for one in servers)
        self._clock = clock
        self._probing: asyncio.Task[tuple[IceServer, ...]] | None = None
        self._probed_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._servers)

    @property
    def can_relay(self) -> bool:
        """Whether one of them is a TURN server."""
        return any(one.relays for one in self._servers)

    async def choose(self) -> tuple[IceServer, ...]:
        """At most one STUN and one TURN server, with credentials. None where none answers."""
        if not self._servers:
            return ()
        now = asyncio.get_running_loop().time()
        if self._probing is None or (self._probing.done() and now - self._probed_at > _PROBE_AGAIN):
            self._probed_at = now
            self._probing = asyncio.create_task(self._probe())
        chosen = await asyncio.shield(self._probing)
        return tuple(one.with_login(self._clock()) for one in chosen)

    def forget(self) -> None:
        """Ask anew at the next choice: the network has changed, or a server failed."""
        if self._probing and self._probing.done():
            self._probing = None

    async def _probe(self) -> tuple[IceServer, ...]:
        """As soon as the first of each kind has answered, or when time is up."""
        kinds = [
            asyncio.create_task(_first([one for one in self._servers if one.relays is relays]))
            for relays in (False, True)
        ]
        try:
            found = await asyncio.gather(*kinds)
        finally:
            for kind in kinds:
                kind.cancel()
        return tuple(one for one in found if one)

    async def close(self) -> None:
        await cancel_and_wait(self._probing)


async def _first(servers: Sequence[IceServer]) -> IceServer | None:
    """The first that answers in time; of those that answer at once, the one named first."""
    probes = {asyncio.create_task(answers(one)): one for one in servers}
    waiting = set(probes)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if living := [one for probe, one in probes.items() if probe in done and probe.result()]:
                    return living[0]
    except TimeoutError:
        pass
    finally:
        for probe in waiting:
            probe.cancel()
    if servers:
        logger.warning("no answer from %s; connections go on without", ", ".join(map(str, servers)))
    return None


async def answers(server: IceServer) -> bool:
    """Whether ``server`` answers a STUN request (by TCP: whether it can be connected to). Until cancelled."""
    loop = asyncio.get_running_loop()
    try:
        if server.transport == "tcp":
            tls = ssl.create_default_context() if server.scheme == "turns" else None
            _, writer = await asyncio.open_connection(server.host, server.port, ssl=tls)
            writer.transport.abort()
            return True
        transport, probe = await loop.create_datagram_endpoint(_Probe, remote_addr=(server.host, server.port))
        try:
            for pause in _RETRANSMIT_SECONDS:
                await asyncio.wait([probe.answered], timeout=pause)
                if probe.answered.done():
                    break
                transport.sendto(probe.request)
            return await asyncio.wait_for(probe.answered, PROBE_SECONDS)
        finally:
            transport.close()
    except (OSError, TimeoutError) as exc:
        logger.debug("ICE server %s: %r", server, exc)
        return False


class _Probe(asyncio.DatagramProtocol):
    """One STUN binding request, which TURN servers answer, too."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        message = stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
        self._id = message.transaction_id
        self.request = bytes(message)

    def datagram_received(self, data: bytes, addr: object) -> None:
        try:
            fits = stun.parse_message(data).transaction_id == self._id
        except ValueError:
            return
        if fits and not self.answered.done():
            self.answered.set_result(True)

    def error_received(self, exc: Exception) -> None:
        if not self.answered.done():
            self.answered.set_result(False)  # nobody listens there

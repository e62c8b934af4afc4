"""Where to listen, where to dial, and which addresses to tell others."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Any

import attrs

from swarmcore.errors import AddressError
from swarmcore.types import Address, PeerId
from swarmcore_transports.own_addresses import reachable_places, undialable

SCHEME = "tcp"

_ENDPOINT = re.compile(r"(?:\[(?P<v6>[^\[\]/]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})")


@attrs.frozen
class Endpoint:
    """A host and a port; the host is a name or a literal IPv4 or IPv6 address."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``host:port`` or ``[v6]:port``. Raise `AddressError` on anything else."""
        match = _ENDPOINT.fullmatch(text)
        if not match or int(match["port"]) > 65535:
            raise AddressError(f"{text!r} is not HOST:PORT or [IPV6]:PORT with a port up to 65535")
        if match["v6"]:
            try:
                ipaddress.IPv6Address(match["v6"])
            except ValueError as exc:
                raise AddressError(f"{match['v6']!r} in {text!r} is not an IPv6 address") from exc
        return cls(match["v6"] or match["host"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def address(self, peer: PeerId) -> Address:
        return Address(SCHEME, f"//{self}", peer)


def endpoint_of(address: Address) -> Endpoint:
    """Where to dial. Raise `AddressError` unless the address is ``tcp://host:port/<peer id>``, and one that
    somebody can dial."""
    if address.scheme != SCHEME or not address.location.startswith("//"):
        raise AddressError(f"{address} is not of the form tcp://host:port/<peer id>")
    endpoint = Endpoint.parse(address.location[2:])
    if reason := undialable(endpoint.host, endpoint.port):
        raise AddressError(f"nobody can dial {address}: {reason}")
    return endpoint


async def connect(endpoint: Endpoint, seconds: float) -> socket.socket:
    """A connected socket. A name's addresses are tried in turn and share ``seconds`` between them.

    Raise OSError, of which TimeoutError is one, from the last attempt. Not asyncio's racing of addresses: on
    Python 3.11 it leaks its sockets when it is cancelled.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    found = await resolve(endpoint)
    for index, (family, kind, protocol, _, address) in enumerate(found):
        share = (deadline - loop.time()) / (len(found) - index)
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(share):
                await loop.sock_connect(sock, address)
        except OSError:
            sock.close()
            if index == len(found) - 1:
                raise
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise OSError(f"{endpoint.host} has no address")


def hang_up(sock: socket.socket) -> None:
    """Let the transport that owns ``sock`` read the end of its stream, on which it closes the socket.

    This is how a TLS handshake is given up: an event loop that is cancelled there may forget the socket.
    """
    with contextlib.suppress(OSError):  # the other side, or the owner, was faster
        sock.shutdown(socket.SHUT_RD)


async def resolve(endpoint: Endpoint, flags: int = 0) -> list[Any]:
    """What getaddrinfo says of the endpoint for TCP. Raise socket.gaierror when it is no host."""
    try:
        # A literal address needs no name service, and so no thread to wait for one.
        return socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        return await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=flags)


def announced(bound: Sequence[Endpoint], announce: Sequence[str], peer: PeerId) -> tuple[Address, ...]:
    """The addresses to tell others: ``announce`` if given, else those bound, wildcards spelt out.

    ``announce`` holds ``host:port`` or whole addresses. Raise `AddressError` on a malformed one.
    """
    if announce:
        return tuple(_announced(text, peer) for text in announce)
    places = reachable_places((endpoint.host, endpoint.port) for endpoint in bound)
    return tuple(Endpoint(host, port).address(peer) for host, port in places)


def _announced(text: str, peer: PeerId) -> Address:
    if "://" in text:
        address = Address.parse(text)
        if address.peer != peer:
            raise AddressError(f"cannot announce {text!r}: it names another peer than this one, {peer}")
    else:
        address = Endpoint.parse(text).address(peer)
    endpoint_of(address)
    return address

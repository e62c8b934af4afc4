"""The addresses of TCP peers, ``tcp://host:port/<peer id>``: which to dial, and which to tell others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from swarmcore.errors import AddressError
from swarmcore.types import Address, PeerId
from swarmcore_transports.listener import Endpoint, resolve
from swarmcore_transports.local_addresses import reachable_places, undialable

SCHEME = "tcp"


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


def addresses_to_announce(
    bound: Sequence[Endpoint], announce: Sequence[str], peer: PeerId
) -> tuple[Address, ...]:
    """The addresses to tell others: ``announce`` if given, else those bound, wildcards spelt out.

    ``announce`` holds ``host:port`` or whole addresses. Raise `AddressError` on a malformed one.
    """
    if announce:
        return tuple(parse_announced(text, peer) for text in announce)
    places = reachable_places((endpoint.host, endpoint.port) for endpoint in bound)
    return tuple(_address(Endpoint(host, port), peer) for host, port in places)


def parse_announced(text: str, peer: PeerId) -> Address:
    """The address of ``peer`` that ``text`` is: ``host:port``, or a whole one. Raise `AddressError`."""
    if "://" in text:
        address = Address.parse(text)
        if address.peer != peer:
            raise AddressError(f"cannot announce {text!r}: it names another peer than this one, {peer}")
    else:
        address = _address(Endpoint.parse(text), peer)
    endpoint_of(address)
    return address


def _address(endpoint: Endpoint, peer: PeerId) -> Address:
    return Address(SCHEME, f"//{endpoint}", peer)

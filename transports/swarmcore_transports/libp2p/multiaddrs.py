"""Libp2p's addresses and ours: ``libp2p:/ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…``."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Literal

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from swarmcore.errors import AddressError
from swarmcore.types import Address, PeerId
from swarmcore_transports.local_addresses import reachable_places, undialable

SCHEME = "libp2p"

Reach = Literal["loopback", "lan", "public", "relayed"]
"""From where an address can be dialled, in the order in which addresses are tried."""


def listen_multiaddr(text: str) -> Multiaddr:
    """Where to listen: ``/ip4/0.0.0.0/tcp/4001``, or for short ``0.0.0.0:4001`` or ``[::]:4001``.

    Raise `AddressError` unless it is an IP address and a TCP port.
    """
    found = parse_multiaddr(text if text.startswith("/") else _from_host_and_port(text))
    names = [protocol.name for protocol in found.protocols()]
    if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise AddressError(f"cannot listen on {text!r}: only /ip4/…/tcp/… and /ip6/…/tcp/… are served")
    return found


def _from_host_and_port(text: str) -> str:
    """``0.0.0.0:4001``, ``[::]:4001`` or ``example.org:4001`` as a multiaddr."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        raise AddressError(f"{text!r} is not a place; expected /ip4/0.0.0.0/tcp/4001 or 0.0.0.0:4001")
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}"


def parse_multiaddr(text: str) -> Multiaddr:
    """Raise `AddressError` when ``text`` is no multiaddr."""
    try:
        return Multiaddr(text)
    except (MultiaddrError, ValueError) as exc:
        raise AddressError(
            f"{text!r} is not a libp2p address, such as /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…: "
            f"{getattr(exc, 'message', exc)}"
        ) from exc


_DIALLED = (["ip4", "tcp"], ["ip6", "tcp"], ["dns", "tcp"], ["dns4", "tcp"], ["dns6", "tcp"])


def to_address(multiaddr: Multiaddr, peer: PeerId) -> Address:
    """The address of ``peer`` at ``multiaddr``, which may or may not name the peer at its end."""
    text = str(multiaddr).removesuffix(f"/p2p/{peer}")
    return Address(SCHEME, f"{text}/p2p", peer)


def to_multiaddr(address: Address) -> Multiaddr:
    """The multiaddr of ``address``, the peer at its end. Raise `AddressError` when it is none of ours."""
    if address.scheme != SCHEME or not address.location.endswith("/p2p"):
        raise AddressError(f"{str(address)!r} is not of the form libp2p:/ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…")
    found = parse_multiaddr(f"{address.location}/{address.peer}")
    names = [protocol.name for protocol in found.protocols()]
    if names[:2] not in _DIALLED:
        raise AddressError(f"{str(address)!r} cannot be dialled: only TCP, directly or through a relay, is")
    if reason := undialable(host_of(found), port_of(found)):
        raise AddressError(f"nobody can dial {address}: {reason}")
    if names[2:] not in (["p2p"], ["p2p", "p2p-circuit", "p2p"]):
        raise AddressError(f"{str(address)!r} is neither a direct address nor one through a relay")
    return found


def parse_announced(text: str, peer: PeerId) -> Multiaddr:
    """What ``--announce`` says, a whole address, a multiaddr, or ``host:port``, without the peer at its end.

    Raise `AddressError` when it is malformed or names another peer.
    """
    if text.startswith(f"{SCHEME}:"):
        address = Address.parse(text)
        if address.peer != peer:
            raise AddressError(f"cannot announce {text!r}: it names another peer than this one, {peer}")
    else:
        address = to_address(
            parse_multiaddr(text if text.startswith("/") else _from_host_and_port(text)), peer
        )
    return parse_multiaddr(str(to_multiaddr(address)).removesuffix(f"/p2p/{peer}"))


def resolve_wildcards(bound: Iterable[Multiaddr]) -> list[Multiaddr]:
    """The addresses by which others reach sockets bound to ``bound``: wildcards become our own addresses."""
    places = reachable_places((host_of(multiaddr), port_of(multiaddr)) for multiaddr in bound)
    return [tcp_multiaddr(host, port) for host, port in places]


def tcp_multiaddr(host: str, port: int) -> Multiaddr:
    """TCP ``port`` at the IP address ``host``."""
    return Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}")


def host_of(multiaddr: Multiaddr) -> str:
    """The IP address that ``multiaddr`` begins with."""
    return str(next(iter(multiaddr.values())))


def decode_tcp_multiaddr(data: bytes) -> Multiaddr | None:
    """The IP address and TCP port that a peer told as ``data``, without a peer id; None if it is none."""
    try:
        address = Multiaddr(data)
        names = [protocol.name for protocol in address.protocols()]
        if names[:2] in (["ip4", "tcp"], ["ip6", "tcp"]) and names[2:] in ([], ["p2p"]):
            return tcp_multiaddr(host_of(address), port_of(address))
    except Exception:  # for malformed bytes the library raises whatever comes
        pass
    return None


def port_of(multiaddr: Multiaddr) -> int:
    """The TCP port that ``multiaddr`` begins with."""
    return int(multiaddr.value_for_protocol("tcp") or 0)


def is_relayed(multiaddr: Multiaddr) -> bool:
    """Whether it leads through a relay."""
    return any(protocol.name == "p2p-circuit" for protocol in multiaddr.protocols())


def relay_of(multiaddr: Multiaddr) -> tuple[Multiaddr, PeerId]:
    """Where the relay of a relayed address is, and who it is."""
    text = str(multiaddr).partition("/p2p-circuit")[0]
    location, _, peer = text.rpartition("/p2p/")
    return Multiaddr(location), PeerId(peer)


def parse_relay(text: str) -> tuple[Multiaddr, PeerId]:
    """Where a relay is that somebody typed, as an address or a multiaddr, and who it is.

    Raise `AddressError` when it is malformed, leads through a relay itself or lacks the peer id.
    """
    found = to_multiaddr(Address.parse(text if text.startswith(f"{SCHEME}:") else f"{SCHEME}:{text}"))
    if is_relayed(found):
        raise AddressError(f"{text!r} is not a relay: it leads through one itself")
    return relay_of(found)


_RELAY_ADDRESSES = 3


def circuit_addresses(relay: PeerId, locations: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Addresses through ``relay``, by those of its ``locations`` that reach farthest, at most three.

    Others than direct TCP ones are left out. Each ends in ``/p2p-circuit``, where the peer's id belongs.
    """
    found: dict[str, Multiaddr] = {}
    for location in locations:
        text = str(location).removesuffix(f"/p2p/{relay}")
        if [protocol.name for protocol in Multiaddr(text).protocols()] in _DIALLED:
            found[text] = Multiaddr(text)
    widest = max(map(preference, found.values()), default=0)
    usable = [text for text, location in found.items() if preference(location) == widest]
    return [Multiaddr(f"{text}/p2p/{relay}/p2p-circuit") for text in usable[:_RELAY_ADDRESSES]]


def reach(multiaddr: Multiaddr) -> Reach:
    """From where ``multiaddr`` can be dialled; a name counts as public."""
    if is_relayed(multiaddr):
        return "relayed"
    names = [protocol.name for protocol in multiaddr.protocols()]
    if names[0] not in ("ip4", "ip6"):
        return "public"
    host = ipaddress.ip_address(str(multiaddr.value_for_protocol(names[0])))
    if host.is_loopback:
        return "loopback"
    return "public" if host.is_global else "lan"


_ORDER: Sequence[Reach] = ("loopback", "lan", "public", "relayed")


def preference(multiaddr: Multiaddr) -> int:
    """Lower is tried first: this machine, the LAN, the Internet, a relay."""
    return _ORDER.index(reach(multiaddr))

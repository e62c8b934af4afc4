"""The IP addresses of this machine: which it has, which lead to it from elsewhere, and when they change."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import ifaddr

logger = logging.getLogger(__name__)

T = TypeVar("T")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

WILDCARDS = ("0.0.0.0", "::")
"""What a socket is bound to that listens on all addresses of a family."""

_POLL_SECONDS = 2.0
"""Systems notify of changes in ways of their own; listing the addresses takes half a millisecond on all."""

MAX_ADDRESSES = 12
"""Addresses of this machine to announce. One with containers has a network for each."""


def reachable_hosts(host: str) -> list[str]:
    """The addresses by which others reach a socket bound to ``host``.

    For a wildcard: this machine's own addresses of that family, the one of the default route first; without
    link-local ones, and loopback only when there is nothing else.
    """
    if host not in WILDCARDS:
        return [host]
    version = 6 if ":" in host else 4
    own = []
    for text, _ in _interface_addresses():
        address = ipaddress.ip_address(text)
        if address.version == version and not (address.is_loopback or address.is_link_local):
            own.append(str(address))
    first = _default_route(version)
    own.sort(key=lambda address: address != first)
    return own or ["::1" if version == 6 else "127.0.0.1"]


def available(places: Sequence[T], host_of: Callable[[T], str]) -> Sequence[T]:
    """Those of ``places`` to listen on: no wildcard of a family that this machine lacks, if others are left.

    So a peer may ask for both families on any machine.
    """
    found = [place for place in places if host_of(place) not in WILDCARDS or _has_family(host_of(place))]
    return found or places


def _has_family(wildcard: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in wildcard else socket.AF_INET) as probe:
            probe.bind((wildcard, 0))
    except OSError:
        return False
    return True


def reachable_places(bound: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The hosts and ports by which others reach sockets bound to ``bound``, `MAX_ADDRESSES` at most.

    As `reachable_hosts` for each; loopback for a wildcard only when there is no wildcard that has more.
    """
    bound = list(bound)
    found = {(own, port): own != host for host, port in bound for own in reachable_hosts(host)}
    spread = any(from_wildcard and not is_loopback(host) for (host, _), from_wildcard in found.items())
    places = [
        (host, port)
        for (host, port), from_wildcard in found.items()
        if not (spread and from_wildcard and is_loopback(host))
    ]
    return places[:MAX_ADDRESSES]


def is_loopback(host: str) -> bool:
    """Whether ``host`` leads nowhere but to the machine that dials it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def undialable(host: str, port: int) -> str:
    """Why nobody can dial ``host`` at ``port``; empty when somebody may be able to.

    Of a name nothing is known: whether it resolves depends on who asks.
    """
    if not 0 < port < 65536:
        return f"there is no port {port} to dial"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    zone = getattr(address, "scope_id", None)
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_unspecified:
        return f"{host} means all addresses of a machine, and is none of them"
    if address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255"):
        return f"{host} is the address of a group"
    if address.version == 4 and address in ipaddress.ip_network("0.0.0.0/8"):
        return f"{host} is nobody's address"
    if address.version == 6 and address.is_link_local and not zone:
        return f"{host} holds on a single link: name the interface, as in {host}%eth0"
    return ""


def loopback_only(hosts: Iterable[str]) -> bool:
    """Whether none of ``hosts`` leads to this machine from another one."""
    return all(map(is_loopback, hosts))


def loopback_note(bound: Iterable[str]) -> str:
    """What to tell about a peer that is reached from its own machine only, bound to ``bound``."""
    if any(host in WILDCARDS for host in bound):
        return (
            "reached from this machine only: it has no other address now; one that comes is announced at once"
        )
    return (
        "reached from this machine only: it listens on loopback; others need it to listen on 0.0.0.0 or [::]"
    )


def local_hosts() -> frozenset[str]:
    """Every IP address of this machine, those of loopback and of single links among it."""
    return frozenset(text for text, _ in _interface_addresses())


def local_networks() -> list[Network]:
    """The networks that this machine has an address in, loopback and link-local ones left out."""
    found: dict[Network, None] = {}
    for text, prefix_length in _interface_addresses():
        network = ipaddress.ip_network(f"{text}/{prefix_length}", strict=False)
        if not (network.is_loopback or network.is_link_local):
            found[network] = None
    return list(found)


def _interface_addresses() -> Iterator[tuple[str, int]]:
    """Every IP address of every interface, with the length of its network's prefix."""
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            yield ip.ip[0] if isinstance(ip.ip, tuple) else ip.ip, ip.network_prefix


def _default_route(version: int) -> str | None:
    """The address this machine sends from; connecting a UDP socket asks the kernel and sends nothing."""
    family, target = (socket.AF_INET6, "2001:db8::1") if version == 6 else (socket.AF_INET, "198.51.100.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


class NetworkMonitor:
    """Calls ``on_change`` when this machine has other IP addresses than before, with those that are gone.

    ``sleep`` is that of the event loop in which it runs: asyncio's or trio's.
    """

    def __init__(
        self,
        on_change: Callable[[frozenset[str]], None],
        sleep: Callable[[float], Awaitable[None]],
        list_hosts: Callable[[], frozenset[str]] = local_hosts,
    ) -> None:
        self._on_change = on_change
        self._sleep = sleep
        self._list_hosts = list_hosts
        self._known = self._current(frozenset())

    async def run(self) -> None:
        """Look until cancelled; what has changed since this object was made counts."""
        while True:
            await self._sleep(_POLL_SECONDS)
            before, self._known = self._known, self._current(self._known)
            if self._known == before:
                continue
            try:
                self._on_change(before - self._known)
            except OSError as exc:  # it changes so fast that it cannot be told: look again
                logger.debug("this machine does not tell its addresses: %r", exc)
                self._known = before

    def _current(self, known: frozenset[str]) -> frozenset[str]:
        try:
            return self._list_hosts()
        except OSError as exc:
            logger.debug("this machine does not tell its addresses: %r", exc)
            return known

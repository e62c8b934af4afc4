"""By which addresses others may reach this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence

import ifaddr

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

WILDCARDS = ("0.0.0.0", "::")
"""What a socket is bound to that listens on all addresses of a family."""

MOST = 12
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
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip[0] if isinstance(ip.ip, tuple) else ip.ip
            address = ipaddress.ip_address(text)
            if address.version == version and not (address.is_loopback or address.is_link_local):
                own.append(str(address))
    first = _default_route(version)
    own.sort(key=lambda address: address != first)
    return own or ["::1" if version == 6 else "127.0.0.1"]


def present(hosts: Sequence[str]) -> list[bool]:
    """Which of ``hosts`` to listen on: all but wildcards of a family that this machine lacks, if any is left.

    So a peer may ask for both families on any machine.
    """
    there = [host not in WILDCARDS or _has_family(host) for host in hosts]
    return there if any(there) else [True] * len(hosts)


def _has_family(wildcard: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in wildcard else socket.AF_INET) as probe:
            probe.bind((wildcard, 0))
    except OSError:
        return False
    return True


def reachable_places(bound: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The hosts and ports by which others reach sockets bound to ``bound``, `MOST` at most.

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
    return places[:MOST]


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


def own_hosts() -> frozenset[str]:
    """Every IP address of this machine, those of loopback and of single links among it."""
    return frozenset(
        ip.ip[0] if isinstance(ip.ip, tuple) else ip.ip
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    )


def own_networks() -> list[Network]:
    """The networks that this machine has an address in, loopback and link-local ones left out."""
    found: dict[Network, None] = {}
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip[0] if isinstance(ip.ip, tuple) else ip.ip
            network = ipaddress.ip_network(f"{text}/{ip.network_prefix}", strict=False)
            if not (network.is_loopback or network.is_link_local):
                found[network] = None
    return list(found)


def _default_route(version: int) -> str | None:
    """The address this machine sends from; connecting a UDP socket asks the kernel and sends nothing."""
    family, target = (socket.AF_INET6, "2001:db8::1") if version == 6 else (socket.AF_INET, "198.51.100.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])

"""By which addresses others may reach this machine."""

from __future__ import annotations

import ipaddress
import socket

import ifaddr

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def reachable_hosts(host: str) -> list[str]:
    """The addresses by which others reach a socket bound to ``host``.

    For a wildcard: this machine's own addresses of that family, the one of the default route first; without
    link-local ones, and loopback only when there is nothing else.
    """
    if host not in ("0.0.0.0", "::"):
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

from __future__ import annotations

import ipaddress

import pytest

from swarmcore.errors import AddressError
from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore_transports.listener import Endpoint
from swarmcore_transports.local_addresses import reachable_hosts
from swarmcore_transports.tcp.addresses import addresses_to_announce, endpoint_of, parse_announced

PEER = Identity.generate().peer


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:31330", "example.org:65535", "0.0.0.0:1"])
def test_endpoints_read_and_write_the_same(text: str) -> None:
    assert str(Endpoint.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "host", ":80", "host:", "host:65536", "host:-1", "::1:80", "[::1]", "[host]:80", "a b:80", "h:80/x"],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(AddressError):
        Endpoint.parse(text)


def test_addresses() -> None:
    address = Address.parse(f"tcp://[::1]:31330/{PEER}")
    assert endpoint_of(address) == Endpoint("::1", 31330)
    assert parse_announced(str(endpoint_of(address)), PEER) == address
    for url in (f"tcp://host:0/{PEER}", f"tcp:host:80/{PEER}", f"udp://host:80/{PEER}", f"tcp://host/{PEER}"):
        with pytest.raises(AddressError):
            endpoint_of(Address.parse(url))


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_is_announced_as_own_addresses(wildcard: str) -> None:
    hosts = [ipaddress.ip_address(host) for host in reachable_hosts(wildcard)]
    assert hosts
    assert all(not (host.is_unspecified or host.is_link_local) for host in hosts)
    assert all(host.version == ipaddress.ip_address(wildcard).version for host in hosts)
    assert len(hosts) == 1 or not any(host.is_loopback for host in hosts)


def test_loopback_is_announced_when_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmcore_transports.local_addresses.ifaddr.get_adapters", list)
    assert reachable_hosts("0.0.0.0") == ["127.0.0.1"]
    assert reachable_hosts("::") == ["::1"]


def test_announce_replaces_what_was_bound() -> None:
    bound = [Endpoint("127.0.0.1", 5000)]
    assert addresses_to_announce(bound, (), PEER) == (Address("tcp", "//127.0.0.1:5000", PEER),)
    outside = (Address("tcp", "//example.org:80", PEER),)
    assert addresses_to_announce(bound, ["example.org:80"], PEER) == outside
    assert addresses_to_announce(bound, [str(outside[0])], PEER) == outside
    other = Identity.generate().peer
    for wrong in ("example.org", "example.org:0", f"tcp://example.org:80/{other}"):
        with pytest.raises(AddressError):
            addresses_to_announce(bound, [wrong], PEER)

"""Addresses through relays, and those of relays."""

from __future__ import annotations

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from multiaddr import Multiaddr

from swarmcore.identity import Identity
from swarmcore_transports.libp2p.addresses import MAX_ADDRESSES, AddressManager
from swarmcore_transports.libp2p.multiaddrs import circuit_addresses, parse_relay

RELAY = Identity.generate().peer
PEER = Identity.generate().peer
LOOPBACK, LAN, PUBLIC = "/ip4/127.0.0.1/tcp/1", "/ip4/192.168.0.7/tcp/1", "/ip4/11.0.0.1/tcp/1"
PUBLIC_IP6 = "/ip6/2a00::1/tcp/1"


@pytest.mark.parametrize(
    ("told", "used"),
    [
        ([LOOPBACK], [LOOPBACK]),
        ([LOOPBACK, LAN], [LAN]),
        ([LAN, PUBLIC, LOOPBACK, "/dns4/example.org/tcp/1"], [PUBLIC, "/dns4/example.org/tcp/1"]),
        ([f"{PUBLIC}/p2p/{RELAY}", PUBLIC], [PUBLIC]),
        ([f"/ip4/11.0.0.{n}/tcp/1" for n in range(9)], [f"/ip4/11.0.0.{n}/tcp/1" for n in range(3)]),
        (["/ip4/11.0.0.1/udp/1/quic-v1", f"{PUBLIC}/p2p/{PEER}", f"{PUBLIC}/p2p/{RELAY}/p2p-circuit"], []),
    ],
)
def test_the_addresses_that_reach_farthest_are_used(told: list[str], used: list[str]):
    found = circuit_addresses(RELAY, [Multiaddr(text) for text in told])
    assert list(map(str, found)) == [f"{text}/p2p/{RELAY}/p2p-circuit" for text in used]


@pytest.mark.parametrize("scheme", ["", "libp2p:"])
def test_a_relay_is_given_as_an_address_or_a_multiaddr(scheme: str):
    assert parse_relay(f"{scheme}{PUBLIC}/p2p/{RELAY}") == (Multiaddr(PUBLIC), RELAY)


def own(*listening: str, announced: str = "") -> AddressManager:
    addresses = AddressManager([Multiaddr(announced)] if announced else [], lambda: None)
    addresses.put("listening", map(Multiaddr, listening))
    return addresses


def test_who_counts_as_reachable_by_everybody():
    assert not own(LOOPBACK, LAN).public
    assert own(LAN, PUBLIC).public
    assert own(LAN, announced=PUBLIC).public
    assert not own(LAN, PUBLIC_IP6).public, "routers of homes let nobody in by IPv6"
    verified = own(LAN, PUBLIC_IP6)
    verified.put("verified", [Multiaddr(PUBLIC_IP6)])
    assert verified.public


def test_watchers_hear_of_changes_that_are_not_told_to_others():
    addresses, heard = own(LAN, announced=PUBLIC), []
    addresses.subscribe(lambda: heard.append(addresses.of("verified")))
    addresses.put("verified", [Multiaddr(PUBLIC)])
    addresses.put("verified", [Multiaddr(PUBLIC)])
    assert heard == [[Multiaddr(PUBLIC)]]


def test_on_a_machine_with_many_networks_there_is_room_for_the_addresses_that_matter():
    lans = [f"/ip4/172.{n}.0.1/tcp/1" for n in range(17, 31)]
    addresses = own(*lans)
    assert list(map(str, addresses.all())) == lans[:MAX_ADDRESSES]
    addresses.put("mapped", [Multiaddr(PUBLIC)])
    relayed = Multiaddr(f"{PUBLIC}/p2p/{RELAY}/p2p-circuit")
    addresses.put("relayed", [relayed])
    assert list(map(str, addresses.all())) == [*lans[: MAX_ADDRESSES - 2], PUBLIC, str(relayed)]

"""The order in which a libp2p peer's addresses are dialled."""

from __future__ import annotations

import ipaddress

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

from swarmcore.identity import Identity
from swarmcore.types import Address
from swarmcore_transports.libp2p import Libp2pTransport
from swarmcore_transports.libp2p.dial_ranker import DialRanker
from swarmcore_transports.local_addresses import Network, local_networks, reachable_hosts

PEER, RELAY = (Identity.from_seed(bytes([n]) * 32).peer for n in (1, 2))


def at(place: str) -> Address:
    return Address("libp2p", f"{place}/p2p", PEER)


HERE = at("/ip4/127.0.0.1/tcp/1")
OWN_LAN, OWN_LAN_6 = at("/ip4/192.168.1.7/tcp/1"), at("/ip6/fd00::7/tcp/1")
PUBLIC, NAMED = at("/ip4/8.8.8.8/tcp/1"), at("/dns/example.org/tcp/1")
RELAYED = at(f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit")
OTHER_LAN, DOCKER = at("/ip4/10.7.0.2/tcp/1"), at("/ip4/172.17.0.1/tcp/1")
MALFORMED = at("/ip4/nowhere")


def networks(*texts: str) -> list[Network]:
    return [ipaddress.ip_network(text) for text in texts]


def test_lans_of_others_come_after_all_that_may_work() -> None:
    ranker = DialRanker(lambda: networks("192.168.1.0/24", "fd00::/64"))
    announced = [MALFORMED, OTHER_LAN, DOCKER, RELAYED, NAMED, PUBLIC, OWN_LAN, OWN_LAN_6, HERE]
    in_order = sorted(announced, key=lambda address: ranker.preference(address, 0.0))
    assert in_order == [HERE, OWN_LAN, OWN_LAN_6, NAMED, PUBLIC, RELAYED, OTHER_LAN, DOCKER, MALFORMED]


def test_a_change_of_network_is_noticed_within_ten_seconds() -> None:
    here = networks("192.168.1.0/24")
    ranker = DialRanker(lambda: list(here))
    assert ranker.distance(OTHER_LAN, 0.0) == "other lan"
    here[:] = networks("10.7.0.0/16")
    assert ranker.distance(OTHER_LAN, 9.9) == "other lan"
    assert ranker.distance(OTHER_LAN, 10.0) == "own lan"
    assert ranker.distance(OWN_LAN, 10.0) == "other lan"


async def test_the_transport_tells_its_preference() -> None:
    transport = Libp2pTransport(Identity.generate())
    assert transport.preference(HERE) < transport.preference(PUBLIC) < transport.preference(RELAYED)
    await transport.close()


def test_local_networks_have_the_addresses_that_are_announced() -> None:
    found = local_networks()
    for host in map(ipaddress.ip_address, reachable_hosts("0.0.0.0")):
        assert host.is_loopback != any(host in network for network in found)

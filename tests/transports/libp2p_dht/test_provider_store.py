"""How much a node of the DHT lists for others."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from swarmcore.identity import Identity
from swarmcore_transports.libp2p_dht import server as kademlia
from swarmcore_transports.libp2p_dht.records import INDEX_KEY_BYTES
from swarmcore_transports.libp2p_dht.server import Listings


def key(number: int) -> bytes:
    return number.to_bytes(INDEX_KEY_BYTES, "little")


def somebody(*addresses: Multiaddr) -> PeerInfo:
    return PeerInfo(ID.from_string(Identity.generate().peer), list(addresses))


def listed(listings: Listings) -> int:
    return sum(map(len, listings.providers.values()))


@pytest.fixture
def listings() -> Listings:
    return Listings(Mock())


def test_one_peer_is_listed_under_a_number_of_keys(listings: Listings) -> None:
    one, other = somebody(), somebody()
    for number in range(2 * kademlia._LISTED_OF_A_PEER):
        listings.add_provider(key(number), one)
    assert listed(listings) == kademlia._LISTED_OF_A_PEER
    listings.add_provider(key(0), one)  # it may renew what it has
    listings.add_provider(key(0), other)
    assert {info.peer_id for info in listings.get_providers(key(0))} == {one.peer_id, other.peer_id}


def test_all_peers_together_have_a_bound(listings: Listings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kademlia, "_LISTED", 10)
    monkeypatch.setattr(kademlia, "_LISTED_PER_KEY", 4)
    for number in range(8):
        for _ in range(8):
            listings.add_provider(key(number), somebody())
    assert listed(listings) == 10
    monkeypatch.setattr(kademlia, "LISTED_FOR", -1.0)
    listings.cleanup_expired()
    assert not listings.providers
    listings.add_provider(key(0), somebody())
    assert listed(listings) == 1


def test_addresses_that_are_too_long_are_left_out(listings: Listings) -> None:
    listings.add_provider(
        key(0), somebody(Multiaddr("/unix/" + "x" * 300), Multiaddr("/ip4/127.0.0.1/tcp/1"))
    )
    [info] = listings.get_providers(key(0))
    assert info.addrs == [Multiaddr("/ip4/127.0.0.1/tcp/1")]

"""How much a node of the DHT lists for others."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from swarmcore.identity import Identity
from swarmcore_transports.libp2p.patches import kad_dht
from swarmcore_transports.libp2p.patches.kad_dht import BoundedProviderStore


def key(number: int) -> bytes:
    return number.to_bytes(kad_dht._KEY_BYTES, "little")


def somebody(*addresses: Multiaddr) -> PeerInfo:
    return PeerInfo(ID.from_string(Identity.generate().peer), list(addresses))


def listed(store: BoundedProviderStore) -> int:
    return sum(map(len, store.providers.values()))


@pytest.fixture
def store() -> BoundedProviderStore:
    return BoundedProviderStore(Mock())


def test_one_peer_is_listed_under_a_number_of_keys(store: BoundedProviderStore) -> None:
    one, other = somebody(), somebody()
    for number in range(2 * kad_dht._MAX_KEYS_PER_PROVIDER):
        store.add_provider(key(number), one)
    assert listed(store) == kad_dht._MAX_KEYS_PER_PROVIDER
    store.add_provider(key(0), one)  # it may renew what it has
    store.add_provider(key(0), other)
    assert {info.peer_id for info in store.get_providers(key(0))} == {one.peer_id, other.peer_id}


def test_all_peers_together_have_a_bound(
    store: BoundedProviderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kad_dht, "_MAX_PROVIDERS", 10)
    monkeypatch.setattr(kad_dht, "_MAX_PROVIDERS_PER_KEY", 4)
    for number in range(8):
        for _ in range(8):
            store.add_provider(key(number), somebody())
    assert listed(store) == 10
    monkeypatch.setattr(kad_dht, "PROVIDER_TTL", -1.0)
    store.cleanup_expired()
    assert not store.providers
    store.add_provider(key(0), somebody())
    assert listed(store) == 1


def test_addresses_that_are_too_long_are_left_out(store: BoundedProviderStore) -> None:
    store.add_provider(key(0), somebody(Multiaddr("/unix/" + "x" * 300), Multiaddr("/ip4/127.0.0.1/tcp/1")))
    [info] = store.get_providers(key(0))
    assert info.addrs == [Multiaddr("/ip4/127.0.0.1/tcp/1")]

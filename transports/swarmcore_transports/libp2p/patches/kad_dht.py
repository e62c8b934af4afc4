"""Repairs of py-libp2p's Kademlia: what a node stores for others is bounded, and its replies are small."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.kad_dht.provider_store import ProviderRecord, ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError

PROVIDER_TTL = 3600.0
"""Seconds for which a provider record is kept that is not renewed."""

_KEY_BYTES = 34  # of a SHA2-256 multihash
_MAX_PROVIDERS_PER_KEY = 512
_MAX_KEYS = 8192
_MAX_PROVIDERS = 65_536
_MAX_KEYS_PER_PROVIDER = 64
_MAX_ADDRESSES = 8
_MAX_ADDRESS_BYTES = 256

_MAX_CLOSER_PEERS = 8
_MAX_NEWCOMERS = 256
_NEWCOMER_SECONDS = 10.0
"""For which a newcomer is not given out again."""


class RepairedKadDHT(KadDHT):
    """Answers what others ask, and names those who ask to whoever reads `newcomers`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._named: dict[ID, float] = {}
        self._send_newcomer, self.newcomers = trio.open_memory_channel[ID](_MAX_NEWCOMERS)
        """Those that have asked something, and may serve the DHT themselves."""

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Repairs: called with whoever asks something, it takes them all into the routing table.

        Clients, too, at whom records would be lost; here they are only named to `newcomers`.
        """
        self.add_newcomer(peer_id)
        return False

    def add_newcomer(self, peer: ID) -> None:
        """Give ``peer`` to whoever reads `newcomers`, unless it is in the routing table."""
        now = trio.current_time()
        since = now - _NEWCOMER_SECONDS
        if self.routing_table.peer_in_table(peer) or self._named.get(peer, 0.0) > since:
            return
        if len(self._named) >= _MAX_NEWCOMERS:
            self._named = {other: at for other, at in self._named.items() if at > since}
        with contextlib.suppress(trio.WouldBlock):
            self._send_newcomer.send_nowait(peer)
            self._named[peer] = now

    def _add_closer_peers_to_response(
        self, response: Message, closest_peers: Sequence[ID], exclude_peer_id: ID | None = None
    ) -> None:
        """Repairs: twenty are named, each with a signed record of its addresses: nine tenths of a reply."""
        nearest = [peer for peer in closest_peers if peer != exclude_peer_id][:_MAX_CLOSER_PEERS]
        for peer in nearest:
            with contextlib.suppress(PeerStoreError):
                addresses = self.host.get_peerstore().addrs(peer)[:_MAX_ADDRESSES]
                response.closerPeers.add(id=peer.to_bytes(), addrs=[one.to_bytes() for one in addresses])


class ExpiringValueStore(ValueStore):
    """Repairs: every value that others store is kept for a day. ``held_until`` says until when for each."""

    def __init__(self, host: IHost, local_peer_id: ID, held_until: Callable[[bytes, float], float]) -> None:
        super().__init__(host, local_peer_id)
        self._held_until = held_until

    def put_record(self, key: bytes, record: Record) -> None:
        super().put_record(key, record)
        self.store[key] = (record, self._held_until(record.value, time.time()))


class BoundedProviderStore(ProviderStore):
    """Repairs: a key keeps its first twenty providers, for two days, and there may be any number of keys.

    Here a key keeps its latest `_MAX_PROVIDERS_PER_KEY` for `PROVIDER_TTL` seconds, and there are at most
    `_MAX_KEYS` keys, `_MAX_PROVIDERS` records of all peers and `_MAX_KEYS_PER_PROVIDER` of each. Keys are
    SHA2-256 multihashes; others are ignored.
    """

    def __init__(self, host: IHost, peer_routing: Any = None) -> None:
        super().__init__(host, peer_routing)
        self._of_peer: Counter[str] = Counter()
        self._entries = 0

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        if len(key) != _KEY_BYTES or (key not in self.providers and len(self.providers) >= _MAX_KEYS):
            return
        peer, providers = str(provider.peer_id), self.providers.get(key, {})
        if peer in providers:
            self._remove(providers, peer)
        elif self._of_peer[peer] >= _MAX_KEYS_PER_PROVIDER or self._entries >= _MAX_PROVIDERS:
            return
        elif len(providers) >= _MAX_PROVIDERS_PER_KEY:
            self._remove(providers, next(iter(providers)))  # that has not been renewed for longest
        addresses = [one for one in provider.addrs if len(one.to_bytes()) <= _MAX_ADDRESS_BYTES]
        info = PeerInfo(provider.peer_id, addresses[:_MAX_ADDRESSES])
        providers[peer] = ProviderRecord(info, time.time())
        self.providers[key] = providers
        self._of_peer[peer] += 1
        self._entries += 1

    def _remove(self, providers: dict[str, ProviderRecord], peer: str) -> None:
        del providers[peer]
        self._entries -= 1
        self._of_peer[peer] -= 1
        if not self._of_peer[peer]:
            del self._of_peer[peer]

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        since = time.time() - PROVIDER_TTL
        records = self.providers.get(key, {}).values()
        return [record.provider_info for record in records if record.timestamp > since]

    def cleanup_expired(self) -> None:
        since = time.time() - PROVIDER_TTL
        for key, providers in list(self.providers.items()):
            for peer in [peer for peer, record in providers.items() if record.timestamp <= since]:
                self._remove(providers, peer)
            if not providers:
                del self.providers[key]

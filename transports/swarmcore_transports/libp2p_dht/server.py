"""The serving half of the DHT: py-libp2p's Kademlia on the transport's host, under our protocol's name.

The library offers no name but its own, so it is given a view of the host that translates it. It bounds what a
node stores for others hardly at all; here every store is bounded, and each entry of an index expires.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence, Sized
from typing import Any, cast

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.kad_dht.provider_store import ProviderRecord, ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.store import Drop
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p_dht.records import (
    INDEX_KEY_BYTES,
    NAMESPACE,
    RefusedValue,
    ValueRules,
    latest,
    sequence_of,
)

KAD = TProtocol("/swarmcore/kad/1.0.0")

LISTED_FOR = 3600.0
"""Seconds for which an entry of an index is kept that is not renewed."""

_LISTED_PER_KEY = 512
_INDEX_KEYS = 8192
_LISTED = 65_536
_LISTED_OF_A_PEER = 64
_ADDRESS_BYTES = 256
_STREAM_SECONDS = 30.0
_INCOMING = 256  # streams served at a time
_ENTRIES_OF_A_PEER = 200  # in ten seconds
_ADDRESSES = 8
_NEWCOMERS = 256
_NAMED_AGAIN = 10.0  # seconds
_CLOSER = 8


class Kademlia(KadDHT):
    """Serves what others ask. It is not run as a service: its own upkeep and look-ups are not used.

    ``heard`` is called with every record that passes ``rules`` as others store it here.
    """

    def __init__(
        self,
        host: Host,
        rules: ValueRules,
        capacity: int,
        *,
        serving: bool,
        heard: Callable[[SignedRecord], None],
    ) -> None:
        values = _Values(rules, capacity, heard)
        super().__init__(
            cast(IHost, _NamedHost(host)),
            DHTMode.SERVER if serving else DHTMode.CLIENT,
            validator=NamespacedValidator({NAMESPACE: values}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        self.value_store = Records(self.host, self.local_peer_id, rules)
        self.provider_store = Listings(self.host, self.peer_routing)
        self._provider_rate_max = _ENTRIES_OF_A_PEER
        self._inbound_limiter = trio.CapacityLimiter(_INCOMING)
        values.stored = self.value_store.store
        self._named: dict[ID, float] = {}
        self._tell_newcomer, self.newcomers = trio.open_memory_channel[ID](_NEWCOMERS)
        """Those that have asked something, and may serve the DHT themselves."""

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Called with whoever asks something. The library takes them all into its table, clients, too, at
        whom records would be lost; here they are only named to `newcomers`."""
        self.name(peer_id)
        return False

    def name(self, peer: ID) -> None:
        """Give ``peer`` to whoever reads `newcomers`, if it is new."""
        now = trio.current_time()
        if self.routing_table.peer_in_table(peer) or self._named.get(peer, 0.0) > now - _NAMED_AGAIN:
            return
        if len(self._named) >= _NEWCOMERS:
            self._named = {other: at for other, at in self._named.items() if at > now - _NAMED_AGAIN}
        with contextlib.suppress(trio.WouldBlock):
            self._tell_newcomer.send_nowait(peer)
            self._named[peer] = now

    def _add_closer_peers_to_response(
        self, response: Message, closest_peers: Sequence[ID], exclude_peer_id: ID | None = None
    ) -> None:
        """The library names twenty, each with a signed record of its addresses: nine tenths of a reply."""
        nearest = [peer for peer in closest_peers if peer != exclude_peer_id][:_CLOSER]
        for peer in nearest:
            with contextlib.suppress(PeerStoreError):
                addresses = self.host.get_peerstore().addrs(peer)[:_ADDRESSES]
                response.closerPeers.add(id=peer.to_bytes(), addrs=[one.to_bytes() for one in addresses])

    def store_own(self, key: bytes, value: bytes) -> None:
        """Keep ``value`` here, for others to read."""
        self.value_store.put_record(key, Record(key=key, value=value))

    def list_own(self, key: bytes, addresses: Sequence[Multiaddr]) -> None:
        """List this peer under ``key`` of an index here."""
        self.provider_store.add_provider(key, PeerInfo(self.local_peer_id, list(addresses)))

    def stored(self, key: bytes) -> bytes | None:
        """What is kept here under ``key``."""
        record = self.value_store.get(key)
        return record.value if record is not None else None

    def expire(self) -> None:
        """Let go of records and entries of indices that have ended."""
        self.value_store.cleanup_expired()
        self.provider_store.cleanup_expired()


class Records(ValueStore):
    """What others may read here: each record for its own ttl, where the library keeps all for a day."""

    def __init__(self, host: IHost, local_peer_id: ID, rules: ValueRules) -> None:
        super().__init__(host, local_peer_id)
        self._rules = rules

    def put_record(self, key: bytes, record: Record) -> None:
        super().put_record(key, record)
        self.store[key] = (record, self._rules.held_until(record.value, time.time()))


class _Values(Validator):
    def __init__(self, rules: ValueRules, capacity: int, heard: Callable[[SignedRecord], None]) -> None:
        self.stored: Sized = ()
        self._rules = rules
        self._capacity = capacity
        self._heard = heard

    def validate(self, key: str, value: bytes) -> None:
        if len(self.stored) >= self._capacity:
            self._rules.dropped[Drop.FULL] += 1
            raise RefusedValue(Drop.FULL)
        self._heard(self._rules.check(key.encode(), value, time.time()))

    def select(self, key: str, values: list[bytes]) -> int:
        """Of what is held and what is offered, in this order."""
        best = latest(values)
        if sequence_of(values[best]) > sequence_of(values[-1]):
            self._rules.dropped[Drop.REPLAYED] += 1
        return best


class Listings(ProviderStore):
    """Who is listed under the keys of the indices.

    The library keeps twenty a key, the first ones, for two days, and any number of keys. Here a key keeps the
    latest `_LISTED_PER_KEY` for `LISTED_FOR` seconds, and there are at most `_INDEX_KEYS` keys, `_LISTED`
    entries of all peers and `_LISTED_OF_A_PEER` of each.
    """

    def __init__(self, host: IHost, peer_routing: Any = None) -> None:
        super().__init__(host, peer_routing)
        self._of_peer: Counter[str] = Counter()
        self._entries = 0

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        if len(key) != INDEX_KEY_BYTES or (key not in self.providers and len(self.providers) >= _INDEX_KEYS):
            return
        peer, listed = str(provider.peer_id), self.providers.get(key, {})
        if peer in listed:
            self._forget(listed, peer)
        elif self._of_peer[peer] >= _LISTED_OF_A_PEER or self._entries >= _LISTED:
            return
        elif len(listed) >= _LISTED_PER_KEY:
            self._forget(listed, next(iter(listed)))  # the one that has not been renewed for longest
        addresses = [one for one in provider.addrs if len(one.to_bytes()) <= _ADDRESS_BYTES][:_ADDRESSES]
        listed[peer] = ProviderRecord(PeerInfo(provider.peer_id, addresses), time.time())
        self.providers[key] = listed
        self._of_peer[peer] += 1
        self._entries += 1

    def _forget(self, listed: dict[str, ProviderRecord], peer: str) -> None:
        del listed[peer]
        self._entries -= 1
        self._of_peer[peer] -= 1
        if not self._of_peer[peer]:
            del self._of_peer[peer]

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        since = time.time() - LISTED_FOR
        return [
            record.provider_info
            for record in self.providers.get(key, {}).values()
            if record.timestamp > since
        ]

    def cleanup_expired(self) -> None:
        since = time.time() - LISTED_FOR
        for key, listed in list(self.providers.items()):
            for peer in [peer for peer, record in listed.items() if record.timestamp <= since]:
                self._forget(listed, peer)
            if not listed:
                del self.providers[key]


class _NamedHost:
    """The host as the library sees it: its protocol goes by our name, and each stream has its time."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host.libp2p, name)

    def set_stream_handler(
        self, protocol: TProtocol, handler: Callable[[INetStream], Awaitable[None]]
    ) -> None:
        async def serve(stream: INetStream) -> None:
            with trio.fail_after(_STREAM_SECONDS):
                await handler(stream)

        self._host.serve(_ours(protocol), serve)

    def remove_stream_handler(self, protocol: TProtocol) -> None:
        self._host.stop_serving(_ours(protocol))

    async def new_stream(self, peer: ID, protocols: Sequence[TProtocol]) -> INetStream:
        return await self._host.libp2p.new_stream(peer, [_ours(protocol) for protocol in protocols])


def _ours(protocol: TProtocol) -> TProtocol:
    return KAD if protocol == PROTOCOL_ID else protocol

"""The serving half of the DHT: py-libp2p's Kademlia on the transport's host, under our protocol's name."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence, Sized
from typing import Any, cast

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.kad_dht.pb.kademlia_pb2 import Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from swarmcore.registry.gossip.records import SignedRecord
from swarmcore.registry.gossip.store import Drop
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.patches.kad_dht import (
    BoundedProviderStore,
    ExpiringValueStore,
    RepairedKadDHT,
)
from swarmcore_transports.libp2p_dht.records import (
    NAMESPACE,
    RefusedValue,
    ValueRules,
    latest,
    sequence_of,
)

KAD = TProtocol("/swarmcore/kad/1.0.0")

_STREAM_SECONDS = 30.0
_MAX_INCOMING_STREAMS = 256
_MAX_PROVIDER_MESSAGES = 200  # of a peer in ten seconds


class KademliaServer(RepairedKadDHT):
    """Serves what others ask. It is not run as a service: the library's upkeep and look-ups are not used.

    ``on_record`` is called with every record that passes ``rules`` as others store it here.
    """

    def __init__(
        self,
        host: Host,
        rules: ValueRules,
        capacity: int,
        *,
        serving: bool,
        on_record: Callable[[SignedRecord], None],
    ) -> None:
        validator = _RecordValidator(rules, capacity, on_record)
        super().__init__(
            cast(IHost, _RenamedProtocolHost(host)),
            DHTMode.SERVER if serving else DHTMode.CLIENT,
            validator=NamespacedValidator({NAMESPACE: validator}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        self.value_store = ExpiringValueStore(self.host, self.local_peer_id, rules.held_until)
        self.provider_store = BoundedProviderStore(self.host, self.peer_routing)
        self._provider_rate_max = _MAX_PROVIDER_MESSAGES
        self._inbound_limiter = trio.CapacityLimiter(_MAX_INCOMING_STREAMS)
        validator.stored = self.value_store.store

    def put_own_record(self, key: bytes, value: bytes) -> None:
        """Keep ``value`` here, for others to read."""
        self.value_store.put_record(key, Record(key=key, value=value))

    def provide_own(self, key: bytes, addresses: Sequence[Multiaddr]) -> None:
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


class _RecordValidator(Validator):
    def __init__(self, rules: ValueRules, capacity: int, on_record: Callable[[SignedRecord], None]) -> None:
        self.stored: Sized = ()
        self._rules = rules
        self._capacity = capacity
        self._on_record = on_record

    def validate(self, key: str, value: bytes) -> None:
        if len(self.stored) >= self._capacity:
            self._rules.dropped[Drop.FULL] += 1
            raise RefusedValue(Drop.FULL)
        self._on_record(self._rules.check(key.encode(), value, time.time()))

    def select(self, key: str, values: list[bytes]) -> int:
        """Of what is held and what is offered, in this order."""
        best = latest(values)
        if sequence_of(values[best]) > sequence_of(values[-1]):
            self._rules.dropped[Drop.REPLAYED] += 1
        return best


class _RenamedProtocolHost:
    """The host as py-libp2p's Kademlia sees it, which knows no name of the protocol but its own.

    Here the protocol goes by our name, and each stream is bounded in time.
    """

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

        self._host.serve(_renamed(protocol), serve)

    def remove_stream_handler(self, protocol: TProtocol) -> None:
        self._host.stop_serving(_renamed(protocol))

    async def new_stream(self, peer: ID, protocols: Sequence[TProtocol]) -> INetStream:
        return await self._host.libp2p.new_stream(peer, [_renamed(protocol) for protocol in protocols])


def _renamed(protocol: TProtocol) -> TProtocol:
    return KAD if protocol == PROTOCOL_ID else protocol

"""The asking half of the DHT: look-ups that end in time, and stores that say who has taken what.

The library's own look-ups ask twenty nodes and wait for the slowest, believe the copy they hold themselves,
and do not say whether a store has failed. These speak the same messages.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence

import attrs
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from swarmcore.registry.gossip.options import CAPACITY
from swarmcore.registry.gossip.records import RecordLimits
from swarmcore.types import short
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p_dht.rpc import MessageSender
from swarmcore_transports.libp2p_dht.server import KademliaServer

logger = logging.getLogger(__name__)

_MAX_CLOSER_NODES = 20
_MAX_ADDRESSES = 8
_MAX_REQUESTS = 64  # nodes by one look-up
_ADDRESS_SECONDS = 3600  # for which an address heard of is remembered
_AVOIDED_SECONDS = 30.0  # for which a node that did not answer is left alone


@attrs.frozen(kw_only=True)
class DhtOptions:
    """Settings of `DhtRegistry`. Those of one swarm may differ but for ``limits``."""

    replicas: int = 8
    """Nodes that hold a record and an entry of an index: those nearest to its key."""
    read_width: int = 3
    """Of these, nodes that have to answer before a look-up ends."""
    parallel: int = 4
    """Nodes asked at a time by one look-up."""
    lookups: int = 6
    """Look-ups at a time."""
    timeout: float = 4.0
    """Most seconds for a node to be dialled and to answer."""
    lookup_timeout: float = 20.0
    """Most seconds for a look-up; what it has found by then counts."""
    refresh: float = 15.0
    """Seconds between looks at the indices; a client sees a newcomer as late as this."""
    reread: float = 100.0
    """Seconds after which the record of a peer in the view is read again; at most a third of its ttl."""
    upkeep: float = 30.0
    """Seconds between looks at who is nearest to this peer's own keys now; those that lack them get them."""
    limits: RecordLimits = attrs.field(factory=RecordLimits)
    """What a record may claim."""
    capacity: int = CAPACITY
    """Most records held: as many in the view, and as many stored for others."""


@attrs.define
class LookupResult:
    """What a look-up has found."""

    nodes: list[ID]
    """Those that answered, the nearest to the key first."""
    replies: dict[ID, Message]


class Lookups:
    """Asks nodes of the DHT, at most ``options.lookups`` times ``options.parallel`` of them at a time."""

    def __init__(self, host: Host, kademlia: KademliaServer, options: DhtOptions) -> None:
        self._host = host
        self._kademlia = kademlia
        self._table = kademlia.routing_table
        self._options = options
        self._slots = trio.CapacityLimiter(options.lookups * options.parallel)
        self.sender = MessageSender(host, options.timeout)
        self._avoided_until: dict[ID, float] = {}
        self._failed_at: dict[ID, float] = {}
        self.requests = 0
        """Messages sent so far."""
        self.unanswered = 0
        """How many of them were not answered."""

    async def find_closest(self, kind: Message.MessageType, key: bytes, width: int) -> LookupResult:
        """Send a message of ``kind`` about ``key`` to ever nearer nodes until the ``width`` nearest answer.

        Nodes that do not answer are passed over. What was found within the time for a look-up is returned.
        """
        message, distance = Message(type=kind, key=key), _distance_to(key)
        known = set(self._table.find_local_closest_peers(key, self._options.replicas))
        replies: dict[ID, Message] = {}
        tried: set[ID] = set()
        with trio.move_on_after(self._options.lookup_timeout):
            while len(tried) < _MAX_REQUESTS:
                nearest = sorted(
                    (node for node in known if node not in tried or node in replies), key=distance
                )
                batch = [node for node in nearest[:width] if node not in tried][: self._options.parallel]
                if not batch:
                    break
                tried.update(batch)
                async with trio.open_nursery() as nursery:
                    for node in batch:
                        nursery.start_soon(self._request_and_add, node, message, replies, known)
        return LookupResult(sorted(replies, key=distance), replies)

    async def _request_and_add(
        self, node: ID, message: Message, replies: dict[ID, Message], known: set[ID]
    ) -> None:
        reply = await self.request(node, message)
        if reply is not None:
            replies[node] = reply
            known.update(self._closer_nodes(reply.closerPeers))

    def _closer_nodes(self, peers: Iterable[Message.Peer]) -> list[ID]:
        """The nodes that a reply names and that may be worth asking, their addresses remembered."""
        store, own, now = self._host.libp2p.get_peerstore(), self._host.libp2p.get_id(), trio.current_time()
        found = []
        for named in list(peers)[:_MAX_CLOSER_NODES]:
            try:
                node = ID(named.id)
                addresses = [Multiaddr(address) for address in list(named.addrs)[:_MAX_ADDRESSES]]
            except Exception:  # an address of a kind that is not known here, or no address
                continue
            if node == own or self._avoided_until.get(node, 0.0) > now:
                continue
            if addresses and not self._host.connections(node):
                store.add_addrs(node, addresses, _ADDRESS_SECONDS)
            found.append(node)
        return found

    async def request(self, node: ID, message: Message) -> Message | None:
        """The reply of ``node``; None when there is none in time."""
        reply: Message | None = None
        self.requests += 1
        async with self._slots:
            with trio.move_on_after(self._options.timeout):
                try:
                    if message.type == Message.ADD_PROVIDER:
                        await self.sender.send_message(node, message)
                        reply = message
                    else:
                        reply = await self.sender.send_request(node, message)
                except Exception as exc:
                    logger.debug("%s does not answer: %r", short(str(node)), exc)
        if reply is not None:
            self._failed_at.pop(node, None)
            self._kademlia.add_newcomer(node)
        else:
            self.unanswered += 1
            if message.type != Message.PUT_VALUE:  # which is refused without a word
                self._note_failure(node)
        return reply

    def _note_failure(self, node: ID) -> None:
        """Leave ``node`` alone for a while when it has no connection left, or does not answer again."""
        now = trio.current_time()
        if self._host.connections(node) and node not in self._failed_at:
            self._failed_at[node] = now
            return
        self._table.remove_peer(node)
        for times in (self._failed_at, self._avoided_until):
            for other in [other for other, at in times.items() if at < now - _AVOIDED_SECONDS]:
                del times[other]
        self._avoided_until[node] = now + _AVOIDED_SECONDS

    async def add_node(self, node: ID) -> None:
        """Take ``node``, which serves the DHT, into the routing table."""
        self._avoided_until.pop(node, None)
        addresses = self.sender.addresses(node)
        if addresses:
            await self._table.add_peer(PeerInfo(node, list(addresses)), skip_server_mode_check=True)

    # --- values and indices ---------------------------------------------------------------------------

    async def get_values(self, key: bytes, width: int) -> list[bytes]:
        """What the ``width`` nodes nearest to ``key``, and this one, hold under it; it may be anything."""
        found = await self.find_closest(Message.GET_VALUE, key, width)
        held = [reply.record.value for reply in found.replies.values() if reply.record.value]
        own = self._kademlia.stored(key)
        return [*held, own] if own is not None else held

    async def get_providers(self, key: bytes) -> list[ID]:
        """Who is listed under ``key`` of an index at the nodes nearest to it, this one included."""
        found = await self.find_closest(Message.GET_PROVIDERS, key, self._options.read_width)
        peers = {info.peer_id for info in self._kademlia.provider_store.get_providers(key)}
        for reply in found.replies.values():
            for named in reply.providerPeers:
                if 0 < len(named.id) <= 64:
                    peers.add(ID(named.id))
        return list(peers)

    async def put_value(self, key: bytes, value: bytes, is_older: Callable[[bytes], bool]) -> int:
        """Store ``value`` at the nodes nearest to ``key`` that hold none or an older one.

        Returns how many of the nearest hold it now.
        """
        found = await self.find_closest(Message.GET_VALUE, key, self._options.replicas)
        message = Message(type=Message.PUT_VALUE, key=key, record=Record(key=key, value=value))
        nodes = found.nodes[: self._options.replicas]
        lacking = [node for node in nodes if is_older(found.replies[node].record.value)]
        return len(nodes) - len(lacking) + await self._send_to_all(lacking, message)

    async def provide(self, key: bytes, provided_at: dict[ID, float], renew_after: float) -> int:
        """List this peer under ``key`` at the nodes nearest to it, but for those told lately.

        ``provided_at`` says when each was told, and is updated; after ``renew_after`` seconds it is again.
        Returns how many of the nearest have been told.
        """
        found = await self.find_closest(Message.FIND_NODE, key, self._options.replicas)
        now, own = trio.current_time(), self._host.libp2p.get_id()
        addresses = [address.to_bytes() for address in self._host.addresses.all()]
        message = Message(type=Message.ADD_PROVIDER, key=key)
        message.providerPeers.add(id=own.to_bytes(), addrs=addresses)
        nodes = found.nodes[: self._options.replicas]
        lacking = [node for node in nodes if provided_at.get(node, now - renew_after) <= now - renew_after]
        provided = await self._send_to_all(lacking, message)
        for node in list(provided_at):
            if node not in nodes:
                del provided_at[node]
        provided_at.update(dict.fromkeys(lacking, now))
        return len(nodes) - len(lacking) + provided

    async def _send_to_all(self, nodes: Sequence[ID], message: Message) -> int:
        taken = 0

        async def send(node: ID) -> None:
            nonlocal taken
            taken += await self.request(node, message) is not None

        for start in range(0, len(nodes), self._options.parallel):
            async with trio.open_nursery() as nursery:
                for node in nodes[start : start + self._options.parallel]:
                    nursery.start_soon(send, node)
        return taken


def _distance_to(key: bytes) -> Callable[[ID], int]:
    target = int.from_bytes(hashlib.sha256(key).digest(), "big")
    return lambda node: target ^ int.from_bytes(hashlib.sha256(node.to_bytes()).digest(), "big")

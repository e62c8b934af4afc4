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

from swarmcore.types import short
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p_dht.options import DhtOptions
from swarmcore_transports.libp2p_dht.rpc import Exchanges
from swarmcore_transports.libp2p_dht.server import Kademlia

logger = logging.getLogger(__name__)

_MAX_CLOSER = 20
_MAX_ADDRESSES = 8
_MAX_ASKED = 64  # nodes by one look-up
_HINT_SECONDS = 3600  # for which an address heard of is remembered
_SHUNNED_SECONDS = 30.0  # for which a node that did not answer is left alone


@attrs.define
class Found:
    """What a look-up has found."""

    nodes: list[ID]
    """Those that answered, the nearest to the key first."""
    replies: dict[ID, Message]


class Lookups:
    """Asks nodes of the DHT, at most ``options.lookups`` times ``options.parallel`` of them at a time."""

    def __init__(self, host: Host, kademlia: Kademlia, options: DhtOptions) -> None:
        self._host = host
        self._kademlia = kademlia
        self._table = kademlia.routing_table
        self._options = options
        self._slots = trio.CapacityLimiter(options.lookups * options.parallel)
        self.exchanges = Exchanges(host, options.timeout)
        self._shunned: dict[ID, float] = {}
        self._failures: dict[ID, float] = {}
        self.asked = 0
        """Messages sent so far."""
        self.silent = 0
        """How many of them were not answered."""

    async def find(self, message: Message, width: int) -> Found:
        """Send ``message`` to ever nearer nodes until the ``width`` nearest known have answered.

        Nodes that do not answer are passed over. What was found within the time for a look-up is returned.
        """
        near = _nearness(message.key)
        known = set(self._table.find_local_closest_peers(message.key, self._options.replicas))
        replies: dict[ID, Message] = {}
        tried: set[ID] = set()
        with trio.move_on_after(self._options.lookup_timeout):
            while len(tried) < _MAX_ASKED:
                nearest = sorted((node for node in known if node not in tried or node in replies), key=near)
                turn = [node for node in nearest[:width] if node not in tried][: self._options.parallel]
                if not turn:
                    break
                tried.update(turn)
                async with trio.open_nursery() as nursery:
                    for node in turn:
                        nursery.start_soon(self._take_answer, node, message, replies, known)
        return Found(sorted(replies, key=near), replies)

    async def _take_answer(
        self, node: ID, message: Message, replies: dict[ID, Message], known: set[ID]
    ) -> None:
        reply = await self.ask(node, message)
        if reply is not None:
            replies[node] = reply
            known.update(self._hints(reply.closerPeers))

    def _hints(self, peers: Iterable[Message.Peer]) -> list[ID]:
        """The nodes that a reply names and that may be worth asking, their addresses remembered."""
        store, own, now = self._host.libp2p.get_peerstore(), self._host.libp2p.get_id(), trio.current_time()
        found = []
        for said in list(peers)[:_MAX_CLOSER]:
            try:
                node = ID(said.id)
                addresses = [Multiaddr(address) for address in list(said.addrs)[:_MAX_ADDRESSES]]
            except Exception:  # an address of a kind that is not known here, or no address
                continue
            if node == own or self._shunned.get(node, 0.0) > now:
                continue
            if addresses and not self._host.connections(node):
                store.add_addrs(node, addresses, _HINT_SECONDS)
            found.append(node)
        return found

    async def ask(self, node: ID, message: Message) -> Message | None:
        """The answer of ``node``; None when there is none in time."""
        reply: Message | None = None
        self.asked += 1
        async with self._slots:
            with trio.move_on_after(self._options.timeout):
                try:
                    if message.type == Message.ADD_PROVIDER:
                        await self.exchanges.tell(node, message)
                        reply = message
                    else:
                        reply = await self.exchanges.exchange(node, message)
                except Exception as exc:
                    logger.debug("%s does not answer: %r", short(str(node)), exc)
        if reply is not None:
            self._failures.pop(node, None)
            self._kademlia.name(node)
        else:
            self.silent += 1
            if message.type != Message.PUT_VALUE:  # which is refused without a word
                self._failed(node)
        return reply

    def _failed(self, node: ID) -> None:
        """Leave ``node`` alone for a while when it has no connection left, or is silent again."""
        now = trio.current_time()
        if self._host.connections(node) and node not in self._failures:
            self._failures[node] = now
            return
        self._table.remove_peer(node)
        for times in (self._failures, self._shunned):
            for other in [other for other, at in times.items() if at < now - _SHUNNED_SECONDS]:
                del times[other]
        self._shunned[node] = now + _SHUNNED_SECONDS

    async def learn(self, node: ID) -> None:
        """Take ``node``, which serves the DHT, into the routing table."""
        self._shunned.pop(node, None)
        addresses = self.exchanges.addresses(node)
        if addresses:
            await self._table.add_peer(PeerInfo(node, list(addresses)), skip_server_mode_check=True)

    # --- values and indices ---------------------------------------------------------------------------

    async def values(self, key: bytes, width: int) -> list[bytes]:
        """What the ``width`` nodes nearest to ``key``, and this one, hold under it; it may be anything."""
        found = await self.find(Message(type=Message.GET_VALUE, key=key), width)
        held = [reply.record.value for reply in found.replies.values() if reply.record.value]
        own = self._kademlia.stored(key)
        return [*held, own] if own is not None else held

    async def listed(self, key: bytes) -> list[ID]:
        """Who is listed under ``key`` of an index at the nodes nearest to it, this one included."""
        found = await self.find(Message(type=Message.GET_PROVIDERS, key=key), self._options.read_width)
        peers = {info.peer_id for info in self._kademlia.provider_store.get_providers(key)}
        for reply in found.replies.values():
            for said in reply.providerPeers:
                if 0 < len(said.id) <= 64:
                    peers.add(ID(said.id))
        return list(peers)

    async def spread(self, key: bytes, value: bytes, is_older: Callable[[bytes], bool]) -> int:
        """Store ``value`` at the nodes nearest to ``key`` that hold none or an older one.

        Returns how many of the nearest hold it now.
        """
        found = await self.find(Message(type=Message.GET_VALUE, key=key), self._options.replicas)
        message = Message(type=Message.PUT_VALUE, key=key, record=Record(key=key, value=value))
        nodes = found.nodes[: self._options.replicas]
        lacking = [node for node in nodes if is_older(found.replies[node].record.value)]
        return len(nodes) - len(lacking) + await self._tell(lacking, message)

    async def enlist(self, key: bytes, recently: dict[ID, float], again: float) -> int:
        """List this peer under ``key`` at the nodes nearest to it, but for those told ``recently``.

        ``recently`` says when each was told, and is updated; after ``again`` seconds a node is told again.
        Returns how many of the nearest have been told.
        """
        found = await self.find(Message(type=Message.FIND_NODE, key=key), self._options.replicas)
        now, own = trio.current_time(), self._host.libp2p.get_id()
        addresses = [address.to_bytes() for address in self._host.addresses.all()]
        message = Message(type=Message.ADD_PROVIDER, key=key)
        message.providerPeers.add(id=own.to_bytes(), addrs=addresses)
        nodes = found.nodes[: self._options.replicas]
        lacking = [node for node in nodes if recently.get(node, now - again) <= now - again]
        told = await self._tell(lacking, message)
        for node in list(recently):
            if node not in nodes:
                del recently[node]
        recently.update(dict.fromkeys(lacking, now))
        return len(nodes) - len(lacking) + told

    async def _tell(self, nodes: Sequence[ID], message: Message) -> int:
        taken = 0

        async def tell(node: ID) -> None:
            nonlocal taken
            taken += await self.ask(node, message) is not None

        for start in range(0, len(nodes), self._options.parallel):
            async with trio.open_nursery() as nursery:
                for node in nodes[start : start + self._options.parallel]:
                    nursery.start_soon(tell, node)
        return taken


def _nearness(key: bytes) -> Callable[[ID], int]:
    target = int.from_bytes(hashlib.sha256(key).digest(), "big")
    return lambda node: target ^ int.from_bytes(hashlib.sha256(node.to_bytes()).digest(), "big")

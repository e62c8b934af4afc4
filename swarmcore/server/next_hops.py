"""To whom a server connects because a client says so: known peers, at the addresses they announce."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.pacing import TokenBuckets
from swarmcore.registry.base import Registry
from swarmcore.resources import Resource
from swarmcore.rpc.asking import ask
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.limits import MAX_ADDRESSES
from swarmcore.wire.messages import Hop, JoinSession, Ping
from swarmcore.wire.protocols import INFERENCE_PROTOCOL, PING_METHOD

logger = logging.getLogger(__name__)

DIAL_TIMEOUT = 5.0
"""Seconds to reach the next server of a chain before the client is asked to carry the hop."""

KNOWN_TIMEOUT = 2.0
"""Seconds in which the record of a server that has just joined may yet come."""

PROVEN_REMEMBERED = 1024
"""Stages whose addresses are remembered beyond their records."""

RATE, BURST = 4.0, 64.0
"""Hops a second that one client may have connected to, on average and at once."""


class StageDialer:
    """Connects to stages that clients name.

    Where to dial is taken from the record that the stage itself has signed and announced, never from the
    client: a server would else dial whatever a stranger likes. A stage that has proven its id there before is
    known by that when its record has come to an end, as in a restart. Whatever goes wrong, the client hears
    the same: what answers at an address, and what does not, is none of its business.
    """

    def __init__(self, node: Node, registry: Registry, counters: Counter[str]) -> None:
        self._node = node
        self._registry = registry
        self._counters = counters
        self._rates = TokenBuckets[PeerId](RATE, BURST)
        self._proven: OrderedDict[PeerId, tuple[str, ...]] = OrderedDict()

    async def join(self, hop: Hop, client: PeerId) -> Channel:
        """A channel into the session that ``client`` has opened at ``hop``.

        Raise `PeerUnreachableError` when there is none to be had.
        """
        try:
            return await self._join(hop, client)
        except SwarmError as exc:
            self._counters["hops_refused"] += 1
            logger.debug("no way to %s for %s: %s", short(hop.peer), short(client), exc)
            raise PeerUnreachableError("the next stage was not reached") from exc

    async def ask_for_life(self, hop: Hop, *, least: float) -> None:
        """Return when the stage shows that it lives; raise as `swarmcore.rpc.asking.ask`."""
        addresses = [Address.parse(url) for url in await self._addresses(hop.peer)]
        await ask(self._node, addresses, PING_METHOD, Ping(), least=least)

    async def _join(self, hop: Hop, client: PeerId) -> Channel:
        now = asyncio.get_running_loop().time()
        if len(hop.addresses) > MAX_ADDRESSES:
            raise PeerUnreachableError(f"{len(hop.addresses)} addresses named, more than {MAX_ADDRESSES}")
        if not self._rates.take(client, now):
            raise PeerUnreachableError("the client asks for too many hops")
        deadline = now + DIAL_TIMEOUT
        with await self._node.resources.acquire(client, Resource.DIALS, deadline=deadline):
            found = await self._addresses(hop.peer)
            opening = JoinSession(hop.session)
            timeout = deadline - asyncio.get_running_loop().time()
            addresses = [Address.parse(url) for url in found]
            channel = await self._node.open(addresses, INFERENCE_PROTOCOL, opening, timeout=timeout)
        self._proven[hop.peer] = found
        self._proven.move_to_end(hop.peer)
        if len(self._proven) > PROVEN_REMEMBERED:
            self._proven.popitem(last=False)
        return channel

    async def _addresses(self, peer: PeerId) -> tuple[str, ...]:
        if peer == self._node.peer:
            return tuple(map(str, self._node.addresses))
        changes = self._registry.changes()
        if not (found := self._announced(peer) or self._proven.get(peer, ())):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KNOWN_TIMEOUT):
                    async for _ in changes:
                        if found := self._announced(peer):
                            break
        if not found:
            raise PeerUnreachableError("no record of the peer is known")
        return found

    def _announced(self, peer: PeerId) -> tuple[str, ...]:
        info = self._registry.view().servers.get(peer)
        return info.addresses if info is not None else ()

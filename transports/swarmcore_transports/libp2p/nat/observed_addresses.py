"""The IP addresses by which peers outside see this one."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import trio
from libp2p.abc import INetConn
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from swarmcore_transports.libp2p.host import Host, is_direct, is_outbound
from swarmcore_transports.libp2p.multiaddrs import Reach, decode_tcp_multiaddr, host_of, reach, tcp_multiaddr
from swarmcore_transports.libp2p.patches.host import reset

logger = logging.getLogger(__name__)

_MAX_OBSERVERS = 3
_ANSWER_SECONDS = 2.0
_MAX_MESSAGE = 64 * 1024


class ObservedAddresses:
    """Asks the peers that this one has dialled, by the identify protocol; lives in trio.

    The library keeps such observations for listening hosts only, and tells them once four peers agree.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen: WeakKeyDictionary[INetConn, str] = WeakKeyDictionary()

    async def hosts(self, reaches: frozenset[Reach]) -> list[str]:
        """What up to three peers say within two seconds, of ``reaches`` only; each is asked once."""
        outbound = [
            connection
            for connection in self._host.swarm.get_connections()
            if not connection.is_closed and is_direct(connection) and is_outbound(connection)
        ]
        asked = outbound[:_MAX_OBSERVERS]
        async with trio.open_nursery() as nursery:
            for connection in asked:
                if connection not in self._seen:
                    nursery.start_soon(self._ask, connection)
        found = dict.fromkeys(self._seen[connection] for connection in asked if self._seen.get(connection))
        return [host for host in found if reach(tcp_multiaddr(host, 1)) in reaches]

    async def _ask(self, connection: INetConn) -> None:
        with trio.move_on_after(_ANSWER_SECONDS):
            try:
                stream = await self._host.open_stream_on(connection, IDENTIFY)
                try:
                    identity = Identify.FromString(
                        await read_varint_prefixed_bytes_limited(stream, _MAX_MESSAGE)
                    )
                finally:
                    await reset(stream)
                observed = decode_tcp_multiaddr(identity.observed_addr)
                self._seen[connection] = host_of(observed) if observed else ""
            except Exception as exc:
                logger.debug("a peer does not say where it sees this one: %r", exc)

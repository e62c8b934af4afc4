"""Connections of the libp2p host: of what kind they are, and who is told as they come and go."""

from __future__ import annotations

from collections.abc import Callable

from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr


def is_direct(connection: INetConn) -> bool:
    """Whether no relay carries it."""
    return connection.get_connection_type() is not ConnectionType.RELAYED


def is_outbound(connection: INetConn) -> bool:
    """Whether this peer has dialled it."""
    return isinstance(connection, SwarmConn) and connection.direction is Direction.OUTBOUND


def remote_host(connection: INetConn) -> str | None:
    """The IP address at the other end; None for a relayed connection."""
    if not is_direct(connection):
        return None
    remote = connection.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
    return str(remote[0]).removeprefix("::ffff:") if remote else None


class Notices(INotifee):
    """Calls everything in ``on_connected`` and ``on_disconnected``, which may neither wait nor raise."""

    def __init__(self) -> None:
        self.on_connected: list[Callable[[INetConn], None]] = []
        self.on_disconnected: list[Callable[[INetConn], None]] = []

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        for tell in self.on_connected:
            tell(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        for tell in self.on_disconnected:
            tell(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

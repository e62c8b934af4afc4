"""The services of the host: relay client and service, AutoNAT, hole punching, following the network."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import trio
from multiaddr import Multiaddr

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.multiaddrs import host_of
from swarmcore_transports.libp2p.nat.autonat import AutoNat
from swarmcore_transports.libp2p.nat.hole_punching import HolePuncher
from swarmcore_transports.libp2p.relay.client import RelayClient
from swarmcore_transports.libp2p.relay.limits import RelayLimits
from swarmcore_transports.libp2p.relay.service import RelayService
from swarmcore_transports.local_addresses import NetworkMonitor, loopback_note, loopback_only

logger = logging.getLogger(__name__)

RelayMode = Literal["auto", "on", "off"]
"""Whether to relay for others: ``"auto"`` does once this peer is known to be reachable by everybody."""


class Services:
    """The services of one host, each of which knows the host; the host knows none of them. Lives in trio."""

    def __init__(
        self,
        host: Host,
        *,
        relay: RelayMode = "auto",
        relay_limits: RelayLimits | None = None,
        relays: Iterable[tuple[Multiaddr, PeerId]] = (),
    ) -> None:
        self.host = host
        self.relay_client = RelayClient(host, relays)
        offers = {"on": lambda: True, "off": lambda: False, "auto": lambda: host.addresses.public}[relay]
        self.relay_service = RelayService(host, relay_limits or RelayLimits(), offers)
        self.autonat = AutoNat(host)
        self.hole_puncher = HolePuncher(host)
        self._network = NetworkMonitor(self._network_changed, trio.sleep)
        host.dial_relayed = self.relay_client.dial

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (
                self._network.run,
                self.relay_client.run,
                self.relay_service.run,
                self.autonat.run,
                self.hole_puncher.run,
            ):
                nursery.start_soon(task)

    def _network_changed(self, gone: frozenset[str]) -> None:
        """This machine has other IP addresses than before, those that are ``gone`` no more."""
        cut = self.host.leave_addresses(gone)
        logger.info("the addresses of this machine have changed; %d connections are cut", cut)
        self.relay_client.network_changed()
        if gone:
            self.autonat.network_changed()
            self.hole_puncher.network_changed()

    def diagnostics(self, mapping: str) -> list[str]:
        """Why this peer, which listens, is not reached as well as it could be, for whoever runs it.

        ``mapping`` is why its router lets nobody in, if it says so. Only reads, so that it may be called in
        any thread.
        """
        addresses = self.host.addresses
        found = []
        if not (addresses.of("relayed") or addresses.of("verified")) and loopback_only(
            map(host_of, addresses.all())
        ):
            found.append(loopback_note(map(host_of, self.host.listen_addresses())))
        outside = self.autonat.status
        why = "; ".join(reason for reason in (outside, mapping) if reason)
        if not addresses.public:
            if addresses.of("relayed"):
                found.append(f"reached through relays only: {why}")
            elif outside.startswith("not reachable"):
                relays = self.relay_client.refusal or "no peer that it knows relays"
                found.append(f"reached by nobody outside, nor through a relay ({relays}): {why}")
        reasons = Counter(self.hole_puncher.failure_reasons())
        found += [f"{count} of its peers stay relayed: {reason}" for reason, count in reasons.most_common(1)]
        return found

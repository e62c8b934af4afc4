"""The signalling services of a listening peer: those that it runs, and those where it registers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Sequence

from swarmcore.errors import AddressError, SwarmError
from swarmcore.resources import ResourceManager
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import Address, PeerId
from swarmcore_transports.local_addresses import available, loopback_note, loopback_only, reachable_places
from swarmcore_transports.webrtc.addresses import ServiceAddress, announced_service
from swarmcore_transports.webrtc.signalling.client import SignallingClient
from swarmcore_transports.webrtc.signalling.client_pool import SignallingClientPool
from swarmcore_transports.webrtc.signalling.service import ServiceLimits, SignallingService


class SignallingEndpoints:
    """Those of ``peer``, who registers at all of them by ``clients``.

    ``tls``, ``limits`` and ``resources`` are for the services that are run here.
    """

    def __init__(
        self,
        peer: PeerId,
        clients: SignallingClientPool,
        tls: ssl.SSLContext | None = None,
        limits: ServiceLimits | None = None,
        resources: Callable[[], ResourceManager] = ResourceManager,
    ) -> None:
        self._peer = peer
        self._clients = clients
        self._tls = tls
        self._limits = limits
        self._resources = resources
        self._allowed: frozenset[PeerId] | None = None
        self._announced: list[ServiceAddress] = []
        self._places: list[str] = []
        self._own: list[ServiceAddress] = []
        self._foreign: list[ServiceAddress] = []
        self.services: list[SignallingService] = []
        """Those that run here."""

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """Let only these register at the services that run here, and this peer itself."""
        self._allowed = frozenset({*peers, self._peer})
        for service in self.services:
            service.allow_only(self._allowed)

    def choose(self, places: Sequence[str], announce: Sequence[str]) -> None:
        """Register at ``places``: a service is to run at each ``host:port``, each ``ws://…`` is another's.

        ``announce`` replaces the addresses of those that run here. Raise `AddressError` for what is neither,
        except for a ``host:port``, of which `open` says so.
        """
        self._announced = [announced_service(text, self._peer) for text in announce]
        self._places = [place for place in places if "://" not in place]
        self._foreign = [ServiceAddress.parse(place) for place in places if "://" in place]

    async def open(self, timeout: float) -> None:
        """Run the services that are to run here, and register at all of those that were chosen.

        Return when the own ones know this peer; where there are none, when one of the others does. Raise
        `AddressError` when nobody does within ``timeout`` seconds, or what the first to fail raises. What has
        been opened stays to be closed.
        """
        places = [ServiceAddress.parse(place) for place in self._places]
        for place in available(places, lambda place: place.host):
            self._own.append(await self._serve(place))
        own = [self._clients.keep(one.from_here(), own=True) for one in self._own]
        foreign = [self._clients.keep(one) for one in self._foreign]
        try:
            async with asyncio.timeout(timeout):
                for client in own:
                    await client.ready()
                if foreign and not own:
                    await _any_ready(foreign)
        except TimeoutError as exc:
            raise AddressError("no signalling service answers; check that one runs there") from exc

    async def _serve(self, place: ServiceAddress) -> ServiceAddress:
        service = SignallingService(self._limits, self._resources(), self._peer)
        if self._allowed is not None:
            service.allow_only(self._allowed)
        found = await service.start(place, self._tls)
        self.services.append(service)
        return found

    def addresses(self) -> tuple[Address, ...]:
        """Those to announce, by the addresses that this machine has now."""
        tls = {one.port: one.tls for one in self._own}
        places = reachable_places((one.host, one.port) for one in self._own)
        own = self._announced or [ServiceAddress(host, port, tls[port]) for host, port in places]
        return tuple(one.address(self._peer) for one in [*own, *self._foreign])

    def notes(self) -> list[str]:
        """What the user should know of where this peer can be reached."""
        places = reachable_places((one.host, one.port) for one in self._own)
        if self._announced or self._foreign or not places or not loopback_only(host for host, _ in places):
            return []
        return [loopback_note(one.host for one in self._own)]

    async def close(self) -> None:
        """Run no service any more."""
        for service in self.services:
            await service.close()
        self.services.clear()


async def _any_ready(clients: Sequence[SignallingClient]) -> None:
    """One living service will do; the others are tried on."""
    waits = [asyncio.ensure_future(client.ready()) for client in clients]
    try:
        for wait in asyncio.as_completed(waits):
            try:
                await wait
                return
            except SwarmError as exc:
                failure = exc
        raise failure
    finally:
        await cancel_and_wait(*waits)

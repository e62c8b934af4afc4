"""The signalling services of a peer: those that it runs, those where it registers, those it needs to dial."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import attrs

from swarmcore.errors import AddressError, SwarmError
from swarmcore.resources import ResourceManager
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import Address, PeerId
from swarmcore_transports.local_addresses import available, loopback_note, loopback_only, reachable_places
from swarmcore_transports.webrtc.addresses import ServiceAddress, announced_service
from swarmcore_transports.webrtc.signalling.client import SignallingClient
from swarmcore_transports.webrtc.signalling.service import ServiceLimits, SignallingService

IDLE_SECONDS = 60.0
"""How long a connection that dialling needed is kept after its last use."""

MAX_IDLE = 16
"""Most such connections; of more, the one unused for longest is closed."""


@attrs.define(eq=False)
class _Entry:
    client: SignallingClient
    task: asyncio.Task[None]
    kept: bool = False
    uses: int = 0
    used_at: float = 0.0


class SignallingClientPool:
    """Makes a client for each service with ``make``, and runs it. ``make`` is told whether the service is
    one that this process runs itself."""

    def __init__(self, make: Callable[[ServiceAddress, bool], SignallingClient]) -> None:
        self._make = make
        self._entries: dict[ServiceAddress, _Entry] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, service: ServiceAddress, *, own: bool = False) -> SignallingClient:
        """The client for ``service``, which stays until the end: others dial this peer there."""
        entry = self._entry(service, own)
        entry.kept = True
        return entry.client

    @contextmanager
    def using(self, service: ServiceAddress) -> Iterator[SignallingClient]:
        """The client for ``service``, not closed while it is used."""
        entry = self._entry(service)
        entry.uses += 1
        try:
            yield entry.client
        finally:
            entry.uses -= 1
            loop = asyncio.get_running_loop()
            entry.used_at = loop.time()
            self._close_idle()

    def reconnect(self) -> None:
        """Connect to all of them anew."""
        for entry in self._entries.values():
            entry.client.reconnect()

    def _entry(self, service: ServiceAddress, own: bool = False) -> _Entry:
        if service not in self._entries:
            client = self._make(service, own)
            self._entries[service] = _Entry(client, asyncio.create_task(client.run()))
        return self._entries[service]

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        idle = [service for service, entry in self._entries.items() if not entry.kept and not entry.uses]
        idle.sort(key=lambda service: self._entries[service].used_at)
        over = len(idle) - MAX_IDLE
        for position, service in enumerate(idle):
            if position < over or loop.time() - self._entries[service].used_at >= IDLE_SECONDS:
                self._entries.pop(service).task.cancel()
        if self._sweeper:
            self._sweeper.cancel()
        self._sweeper = loop.call_later(IDLE_SECONDS / 2, self._close_idle) if idle else None

    async def close(self) -> None:
        """Leave all services."""
        if self._sweeper:
            self._sweeper.cancel()
        tasks = [entry.task for entry in self._entries.values()]
        self._entries.clear()
        await cancel_and_wait(*tasks)


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

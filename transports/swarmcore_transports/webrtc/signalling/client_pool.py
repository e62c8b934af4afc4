"""The connections to signalling services: those where this peer is registered, those needed to dial."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from swarmcore.tasks import cancel_and_wait
from swarmcore_transports.webrtc.addresses import ServiceAddress
from swarmcore_transports.webrtc.signalling.client import SignallingClient

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

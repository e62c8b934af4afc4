"""ICE restarts (RFC 8445, section 9): a new path where the network changes, or a peer is silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, SwarmError
from swarmcore.tasks import BackgroundTasks, cancel_and_wait
from swarmcore.types import short
from swarmcore.wire.limits import Limits
from swarmcore_transports.local_addresses import NetworkMonitor
from swarmcore_transports.webrtc.peer_connections import ManagedConnection, PeerConnections

logger = logging.getLogger(__name__)

SILENT_KEEPALIVES = 1.5
"""After how many keep-alive times without a byte a new path is looked for; a stream ends after three."""

_RETRY_SECONDS = 5.0
"""Before a new path is looked for again where nothing is acknowledged."""

_MIN_ANSWER_SECONDS = 1.0
"""For which an answer is waited for; as long as a keep-alive time, where that is longer."""

_GRACE_SECONDS = 1.0
"""For which a peer that signalling does not find may still be heard on the old path."""

RestartIce = Callable[[ManagedConnection], Coroutine[Any, Any, None]]
"""Finds a new path. Raises a `SwarmError` when there is none; `ConnectionLostError`: there will be none;
`PeerUnreachableError`: it could not even be asked for."""


class IceRestarter:
    """Restarts ICE of the connections that this peer has dialled; the listeners' side has only to answer.

    One side only, so that two restarts never cross (which W3C's WebRTC calls glare). ``on_network_changed``
    is called whenever this machine has other addresses than before, with those that are gone.
    """

    def __init__(
        self,
        connections: PeerConnections,
        limits: Limits,
        restart_ice: RestartIce,
        on_network_changed: Callable[[frozenset[str]], None],
        tasks: BackgroundTasks,
    ) -> None:
        self._connections = connections
        self._limits = limits
        self._restart_ice = restart_ice
        self._on_network_changed = on_network_changed
        self._background = tasks
        self._watching: list[asyncio.Task[None]] = []
        self._asking: dict[ManagedConnection, asyncio.Task[None]] = {}
        self.begun = 0
        """Restarts since the start."""

    def start(self) -> None:
        """Begin to watch. Harmless when repeated."""
        if not self._watching:
            monitor = NetworkMonitor(self._network_changed, asyncio.sleep)
            self._watching = [
                asyncio.create_task(monitor.run(), name="network monitor"),
                asyncio.create_task(self._watch_silence(), name="silence of WebRTC peers"),
            ]

    def _network_changed(self, gone: frozenset[str]) -> None:
        self._on_network_changed(gone)
        now = asyncio.get_running_loop().time()
        for managed in self._connections.current():
            if gone or managed.silent_for(now) > self._limits.keepalive:
                self.begin(managed, "this machine has changed its network", anew=True)

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._limits.keepalive / 4)
            now, patience = loop.time(), SILENT_KEEPALIVES * self._limits.keepalive
            for managed in self._connections.current():
                if min(managed.silent_for(now), now - managed.restarted_at) > patience:
                    self.begin(managed, "its peer is silent")

    def unanswered(self, managed: ManagedConnection) -> None:
        """The peer acknowledges nothing: the path is broken, or the peer is gone."""
        if asyncio.get_running_loop().time() - managed.restarted_at > _RETRY_SECONDS:
            self.begin(managed, "nothing is acknowledged")

    def begin(self, managed: ManagedConnection, reason: str, *, anew: bool = False) -> None:
        """Look for a new path for ``managed``, if this side has dialled it.

        If that is done already it goes on; with ``anew`` what was asked so far is forgotten.
        """
        if managed.dialled and not managed.restarting:
            managed.restarting = True
            self.begun += 1
            logger.info("looking for another path to %s: %s", short(managed.peer), reason)
            self._background.start(self._find_path(managed), f"another path to {short(managed.peer)}")
        elif anew and managed in self._asking:
            self._asking[managed].cancel()

    async def _find_path(self, managed: ManagedConnection) -> None:
        """Ask until there is an answer, or the old path works again."""
        try:
            while managed in self._connections.current() and not await self._settled(managed):
                pass
        finally:
            managed.restarting = False
            managed.restarted_at = asyncio.get_running_loop().time()

    async def _settled(self, managed: ManagedConnection) -> bool:
        """Ask for a new path; whether that need not be done again."""
        asking = self._asking[managed] = asyncio.create_task(self._restart_ice(managed))
        try:
            await asyncio.wait([asking], timeout=max(self._limits.keepalive, _MIN_ANSWER_SECONDS))
            forgotten = asking.cancelled()
        finally:
            del self._asking[managed]
            asking.cancel()
            await asyncio.wait([asking])
        if forgotten:
            return False
        failure = TimeoutError("no answer") if asking.cancelled() else asking.exception()
        if failure is None:
            return True
        if not isinstance(failure, SwarmError | TimeoutError):
            raise failure
        logger.info("no other path to %s: %s", short(managed.peer), failure)
        if isinstance(failure, PeerUnreachableError):
            await asyncio.sleep(_GRACE_SECONDS)
        if isinstance(failure, ConnectionLostError) or (
            isinstance(failure, PeerUnreachableError) and managed.connection.unanswered
        ):
            self._connections.drop(managed, failure.message)
        now = asyncio.get_running_loop().time()
        return not managed.connection.unanswered and managed.silent_for(now) < self._limits.keepalive

    async def close(self) -> None:
        """Watch no more."""
        await cancel_and_wait(*self._watching)
        self._watching = []

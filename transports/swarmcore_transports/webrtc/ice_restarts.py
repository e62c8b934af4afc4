"""When connections get a new path: this machine has changed its network, or the peer has fallen silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, SwarmError
from swarmcore.types import short
from swarmcore.wire.limits import Limits
from swarmcore_transports.local_addresses import NetworkMonitor
from swarmcore_transports.webrtc.peer_connections import Link, Links

logger = logging.getLogger(__name__)

SILENCE = 1.5
"""After how many keep-alive times without a word a new path is looked for; a stream ends after three."""

_AGAIN = 5.0
"""Seconds before a new path is looked for again where nothing is acknowledged."""

_LEAST_PATIENCE = 1.0
"""Seconds for which an answer is waited for; as long as a keep-alive time, where that is longer."""

_LAST_CHANCE = 1.0
"""Seconds for which a peer that signalling does not find may still be heard on the old path."""

RestartOf = Callable[[Link], Coroutine[Any, Any, None]]
"""Finds a new path. Raises a `SwarmError` when there is none; `ConnectionLostError`: there will be none;
`PeerUnreachableError`: it could not even be asked for."""


class Restarts:
    """Restarts the links that this peer has dialled; the listeners' side has only to answer.

    ``on_network`` is called whenever this machine has other addresses than before, with those that are gone.
    """

    def __init__(
        self,
        links: Links,
        limits: Limits,
        restart: RestartOf,
        on_network: Callable[[frozenset[str]], None],
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._links = links
        self._limits = limits
        self._restart = restart
        self._on_network = on_network
        self._in_background = in_background
        self._tasks: list[asyncio.Task[None]] = []
        self._asking: dict[Link, asyncio.Task[None]] = {}
        self.begun = 0
        """Restarts since the start."""

    def start(self) -> None:
        """Begin to watch. Harmless when repeated."""
        if not self._tasks:
            monitor = NetworkMonitor(self._network_changed, asyncio.sleep)
            self._tasks = [
                asyncio.create_task(monitor.run()),
                asyncio.create_task(self._listen_for_silence()),
            ]

    def _network_changed(self, gone: frozenset[str]) -> None:
        self._on_network(gone)
        now = asyncio.get_running_loop().time()
        for link in self._links.current():
            if gone or link.silent_for(now) > self._limits.keepalive:
                self.begin(link, "this machine has changed its network", anew=True)

    async def _listen_for_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._limits.keepalive / 4)
            now, patience = loop.time(), SILENCE * self._limits.keepalive
            for link in self._links.current():
                if min(link.silent_for(now), now - link.restarted_at) > patience:
                    self.begin(link, "its peer is silent")

    def unanswered(self, link: Link) -> None:
        """The peer acknowledges nothing: the path is broken, or the peer is gone."""
        if asyncio.get_running_loop().time() - link.restarted_at > _AGAIN:
            self.begin(link, "nothing is acknowledged")

    def begin(self, link: Link, reason: str, *, anew: bool = False) -> None:
        """Look for a new path for ``link``, if this side has dialled it.

        If that is done already it goes on; with ``anew`` what was asked so far is forgotten.
        """
        if link.dialled and not link.restarting:
            link.restarting = True
            self.begun += 1
            logger.info("looking for another path to %s: %s", short(link.peer), reason)
            self._in_background(self._find_path(link))
        elif anew and link in self._asking:
            self._asking[link].cancel()

    async def _find_path(self, link: Link) -> None:
        """Ask until there is an answer, or the old path works again."""
        try:
            while link in self._links.current() and not await self._settled(link):
                pass
        finally:
            link.restarting = False
            link.restarted_at = asyncio.get_running_loop().time()

    async def _settled(self, link: Link) -> bool:
        """Ask for a new path; whether that need not be done again."""
        asking = self._asking[link] = asyncio.create_task(self._restart(link))
        try:
            await asyncio.wait([asking], timeout=max(self._limits.keepalive, _LEAST_PATIENCE))
            forgotten = asking.cancelled()
        finally:
            del self._asking[link]
            asking.cancel()
            await asyncio.wait([asking])
        if forgotten:
            return False
        failure = TimeoutError("no answer") if asking.cancelled() else asking.exception()
        if failure is None:
            return True
        if not isinstance(failure, SwarmError | TimeoutError):
            raise failure
        logger.info("no other path to %s: %s", short(link.peer), failure)
        if isinstance(failure, PeerUnreachableError):
            await asyncio.sleep(_LAST_CHANCE)
        if isinstance(failure, ConnectionLostError) or (
            isinstance(failure, PeerUnreachableError) and link.connection.unanswered
        ):
            self._links.lost(link, failure.message)
        now = asyncio.get_running_loop().time()
        return not link.connection.unanswered and link.silent_for(now) < self._limits.keepalive

    async def close(self) -> None:
        """Watch no more."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

"""When connections get a new path: this machine has changed its network, or the peer has fallen silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from swarmcore.errors import ConnectionLostError, PeerUnreachableError, SwarmError
from swarmcore.types import short
from swarmcore.wire.limits import Limits
from swarmcore_transports.network_watch import NetworkWatch
from swarmcore_transports.webrtc.links import Link, Links

logger = logging.getLogger(__name__)

SILENCE = 1.5
"""After how many keep-alive times without a word a new path is looked for; a stream ends after three."""

_AGAIN = 5.0
"""Seconds before a new path is looked for again where nothing is acknowledged."""

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
        self.begun = 0
        """Restarts since the start."""

    def start(self) -> None:
        """Begin to watch. Harmless when repeated."""
        if not self._tasks:
            watch = NetworkWatch(self._network_changed, asyncio.sleep)
            self._tasks = [asyncio.create_task(watch.run()), asyncio.create_task(self._listen_for_silence())]

    def _network_changed(self, gone: frozenset[str]) -> None:
        self._on_network(gone)
        now = asyncio.get_running_loop().time()
        for link in self._links.current():
            if gone or link.silent_for(now) > self._limits.keepalive:
                self.begin(link, "this machine has changed its network")

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

    def begin(self, link: Link, reason: str) -> None:
        """Look for a new path for ``link``, if this side has dialled it and does not do so already."""
        if link.dialled and not link.restarting:
            link.restarting = True
            self.begun += 1
            logger.info("looking for another path to %s: %s", short(link.peer), reason)
            self._in_background(self._find_path(link))

    async def _find_path(self, link: Link) -> None:
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                await self._restart(link)
        except ConnectionLostError as exc:
            self._links.lost(link, exc.message)
        except PeerUnreachableError as exc:
            logger.info("no other path to %s: %r", short(link.peer), exc)
            if link.connection.unanswered:
                await asyncio.sleep(_LAST_CHANCE)
                if link.connection.unanswered:
                    self._links.lost(link, exc.message)
        except (SwarmError, TimeoutError) as exc:
            logger.info("no other path to %s: %r", short(link.peer), exc)
        finally:
            link.restarting = False
            link.restarted_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Watch no more."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

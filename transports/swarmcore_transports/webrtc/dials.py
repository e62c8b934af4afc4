"""Attempts to connect to peers, each shared by all who want the same peer at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import attrs

from swarmcore.errors import StreamClosedError, SwarmError
from swarmcore.types import PeerId
from swarmcore_transports.webrtc.links import Link
from swarmcore_transports.webrtc.locations import Service

_CLOSE_SECONDS = 5.0


@attrs.frozen(eq=False)
class _Attempt:
    task: asyncio.Task[Link]
    began: float


class Dials:
    """Runs ``dial``, which gives up by itself after ``timeout`` seconds, once for each peer and service.

    An attempt goes on when those who wait for it stop waiting. One that has used up half its time is left to
    those who wait for it already: whoever comes then begins another.
    """

    def __init__(self, dial: Callable[[PeerId, Service], Coroutine[Any, Any, Link]], timeout: float) -> None:
        self._dial = dial
        self._timeout = timeout
        self._latest: dict[tuple[PeerId, Service], _Attempt] = {}
        self._running: set[asyncio.Task[Link]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    async def link_to(self, peer: PeerId, service: Service) -> Link:
        """A link to ``peer``, who is met at ``service``. Raise what ``dial`` raises, and
        `StreamClosedError` after `close`."""
        task = self._attempt(peer, service).task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            if self._closed and task.cancelled():  # not by who waits here
                raise StreamClosedError("this transport is closed") from exc
            raise
        except SwarmError as exc:
            if self._closed:
                raise StreamClosedError("this transport is closed") from exc
            # For each who waits, with a traceback of its own.
            raise type(exc)(exc.message, **exc.details) from exc

    def _attempt(self, peer: PeerId, service: Service) -> _Attempt:
        key, now = (peer, service), asyncio.get_running_loop().time()
        attempt = self._latest.get(key)
        if attempt is None or now - attempt.began > self._timeout / 2:
            attempt = _Attempt(asyncio.create_task(self._dial(peer, service)), now)
            self._latest[key] = attempt
            self._running.add(attempt.task)
            attempt.task.add_done_callback(lambda task: self._ended(key, task))
        return attempt

    def _ended(self, key: tuple[PeerId, Service], task: asyncio.Task[Link]) -> None:
        self._running.discard(task)
        if (latest := self._latest.get(key)) and latest.task is task:
            del self._latest[key]
        if not task.cancelled():
            task.exception()  # seen here: nobody may wait any more

    async def close(self) -> None:
        """Give up all attempts."""
        self._closed = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)

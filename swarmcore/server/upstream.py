"""Who may push steps and caches into a session, besides the client that opened it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.tasks import deadline_after
from swarmcore.types import PeerId, short

ADMISSION_TIMEOUT = 10.0
"""Seconds that a stage may be ahead of the client's word that it comes before this one now."""

MAX_UPSTREAM = 16
"""Peers that a client may let in at a time: the stage before, and one that hands its caches over."""


def check_upstream(allowed: Collection[PeerId]) -> None:
    """Raise `InvalidStepError` for more peers than ever come before one stage."""
    if len(allowed) > MAX_UPSTREAM:
        raise InvalidStepError(f"{len(allowed)} peers may not push into one session; {MAX_UPSTREAM} at most")


class AllowedUpstream:
    """The peers that the client of one session lets push into it, and those that are doing so.

    With ``allowed`` of None, by a client that names nobody, that is whoever knows the session's id.
    """

    def __init__(self, allowed: Collection[PeerId] | None) -> None:
        self._allowed = None if allowed is None else frozenset(allowed)
        self._changed = asyncio.Event()
        self._connected: dict[asyncio.Timeout, PeerId] = {}
        self._closed = False

    def __repr__(self) -> str:
        allowed = "anyone" if self._allowed is None else ", ".join(sorted(map(short, self._allowed)))
        return f"<AllowedUpstream {len(self._connected)} here · {allowed or 'nobody'} may>"

    def allows(self, peer: PeerId) -> bool:
        """Whether ``peer`` is let in now."""
        return self._allowed is None or peer in self._allowed

    def allow_only(self, allowed: Collection[PeerId]) -> None:
        """Let in ``allowed`` from now on, and disconnect all others. Raise as `check_upstream` does."""
        check_upstream(allowed)
        self._allowed = frozenset(allowed)
        self._changed.set()
        self._disconnect([timeout for timeout, peer in self._connected.items() if not self.allows(peer)])

    def close(self) -> None:
        """Disconnect everybody, those who wait to be let in too."""
        self._closed = True
        self._changed.set()
        self._disconnect(self._connected)

    @asynccontextmanager
    async def connected(self, peer: PeerId) -> AsyncIterator[None]:
        """While ``peer`` is in; the context ends at once when `allow_only` or `close` disconnects it.

        Raise `InvalidStepError` when the client has not let it in within `ADMISSION_TIMEOUT` seconds, and
        `SessionLostError` when the session was closed meanwhile.
        """
        await self._wait_for_admission(peer)
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._connected[timeout] = peer
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
        finally:
            self._connected.pop(timeout, None)

    async def _wait_for_admission(self, peer: PeerId) -> None:
        async with deadline_after(
            ADMISSION_TIMEOUT,
            lambda: InvalidStepError(f"the client of this session does not let {short(peer)} push into it"),
        ):
            while not self.allows(peer) and not self._closed:
                self._changed.clear()
                await self._changed.wait()
        if self._closed:
            raise SessionLostError("the session was closed")

    def _disconnect(self, timeouts: Iterable[asyncio.Timeout]) -> None:
        for timeout in timeouts:
            if not timeout.expired():
                timeout.reschedule(0)

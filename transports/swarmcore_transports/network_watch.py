"""Notices that this machine is on another network than before: another Wi-Fi, a cable, a VPN."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from swarmcore_transports.own_addresses import own_hosts

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
"""Systems tell of it in ways of their own; to look takes half a millisecond on all of them."""


class NetworkWatch:
    """Calls ``on_change`` when this machine has other IP addresses than before, with those that are gone.

    ``sleep`` is that of the event loop in which it runs: asyncio's or trio's.
    """

    def __init__(
        self,
        on_change: Callable[[frozenset[str]], None],
        sleep: Callable[[float], Awaitable[None]],
        look: Callable[[], frozenset[str]] = own_hosts,
    ) -> None:
        self._on_change = on_change
        self._sleep = sleep
        self._look = look
        self._known = self._seen(frozenset())

    async def run(self) -> None:
        """Look until cancelled; what has changed since this object was made counts."""
        while True:
            await self._sleep(_LOOK_SECONDS)
            before, self._known = self._known, self._seen(self._known)
            if self._known == before:
                continue
            try:
                self._on_change(before - self._known)
            except OSError as exc:  # it changes so fast that it cannot be told: look again
                logger.debug("this machine does not tell its addresses: %r", exc)
                self._known = before

    def _seen(self, known: frozenset[str]) -> frozenset[str]:
        try:
            return self._look()
        except OSError as exc:
            logger.debug("this machine does not tell its addresses: %r", exc)
            return known

"""Keeps what a server announces of itself up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import attrs

from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.types import ServerInfo

logger = logging.getLogger(__name__)

REFRESH = 5.0
"""Seconds between looks at whether load or cache have changed enough to be announced."""

LOAD_CHANGES = 5.0
"""Changes of load a second, of all servers together, that a swarm is to carry: each goes to every member."""


@attrs.define(eq=False)
class Announcer:
    """Announces ``info()`` of a server by its registry, for ``ttl`` seconds each time."""

    _node: Node
    _registry: Registry
    _info: Callable[[], ServerInfo]
    _ttl: float
    _announced: ServerInfo | None = attrs.field(default=None, init=False)

    async def announce(self) -> None:
        """Say how it is now; raises as `Registry.announce` does."""
        info = self._info()
        await self._registry.announce(info, self._ttl)
        self._announced = info

    async def try_to_announce(self) -> None:
        """As `announce`; a failure is logged, and `run` tries again at its next refresh."""
        try:
            await self.announce()
        except Exception:
            self._announced = None
            logger.exception("could not announce; trying again in %.0f s", REFRESH)

    async def run(self) -> None:
        """Announce whatever others should know when it has changed; never ends."""
        while True:
            await self._readdressed(within=max(REFRESH, len(self._registry.view()) / LOAD_CHANGES))
            if self._announced is None or _differs(self._announced, self._info()):
                await self.try_to_announce()

    async def _readdressed(self, within: float) -> None:
        """Wait until the server is reached at other addresses than those announced, or for so long."""
        if self._announced is None:
            await asyncio.sleep(within)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._node.addresses_other_than(self._announced.dialable)


def _differs(announced: ServerInfo, current: ServerInfo) -> bool:
    """Whether clients would choose differently: small moves of load are not worth the traffic."""
    free = abs(announced.cache_tokens_free - current.cache_tokens_free)
    speeds = [(announced.decode_rps, current.decode_rps), (announced.forward_rps, current.forward_rps)]
    waits = (announced.queue_seconds, current.queue_seconds)
    steady = attrs.evolve(
        current,
        cache_tokens_free=announced.cache_tokens_free,
        decode_rps=announced.decode_rps,
        forward_rps=announced.forward_rps,
        queue_seconds=announced.queue_seconds,
    )
    return (
        steady != announced
        or free > current.cache_tokens // 20
        or any(abs(old - new) > 0.25 * max(old, new) for old, new in speeds)
        or abs(waits[0] - waits[1]) > max(0.01, 0.25 * max(waits))
    )

"""Joining a swarm on the local network: peers found there are introduced to the registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import attrs

from swarmcore.errors import SwarmError
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.types import Address, ServerInfo

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds to wait for neighbours where there is nobody else to join through."""
_MORE = 0.3
"""Seconds for others to answer after the first."""


async def meet_neighbours(node: Node, registry: Registry, *, patience: float = PATIENCE) -> bool:
    """Introduce to ``registry``, from now on, whom ``node`` finds on the local network.

    Returns whether somebody was found within ``patience`` seconds. Raises as `Node.find_neighbours` does.
    """
    found = asyncio.Event()

    def introduce(addresses: tuple[Address, ...]) -> None:
        registry.introduce(addresses)
        found.set()

    await node.find_neighbours(introduce)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            await found.wait()
            await asyncio.sleep(_MORE)
    return found.is_set()


async def follow_addresses(node: Node, registry: Registry, info: ServerInfo, ttl: float) -> None:
    """Announce ``info``, announced before, again whenever ``node`` has other addresses; never ends."""
    known = info.dialable
    while True:
        known = await node.addresses_other_than(known)
        try:
            await registry.announce(attrs.evolve(info, addresses=tuple(map(str, known))), ttl)
        except SwarmError as exc:
            logger.error("could not announce other addresses: %s", exc)

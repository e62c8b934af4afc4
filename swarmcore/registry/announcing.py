"""Keeping others informed of where a peer is reached."""

from __future__ import annotations

import logging

import attrs

from swarmcore.errors import SwarmError
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.types import Address, ServerInfo

logger = logging.getLogger(__name__)


async def follow_addresses(node: Node, registry: Registry, info: ServerInfo, ttl: float) -> None:
    """Announce ``info``, announced before, again whenever ``node`` has other addresses; never ends."""
    known = tuple(map(Address.parse, info.addresses))
    while True:
        known = await node.addresses_other_than(known)
        try:
            await registry.announce(attrs.evolve(info, addresses=tuple(map(str, known))), ttl)
        except SwarmError as exc:
            logger.error("could not announce other addresses: %s", exc)

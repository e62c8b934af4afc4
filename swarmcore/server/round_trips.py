"""Round trips to servers, measured."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from swarmcore.rpc.node import Node
from swarmcore.server.protocols import PING_METHOD
from swarmcore.types import Address, ServerInfo
from swarmcore.wire.messages import Ping


async def measure_round_trip(node: Node, server: ServerInfo, *, timeout: float) -> float:
    """Seconds of a ping to ``server`` over a connection that is there. Raises as `Node.call` does."""
    addresses = [Address.parse(url) for url in server.addresses]
    loop = asyncio.get_running_loop()
    await node.call(addresses, PING_METHOD, Ping(), timeout=timeout)  # may have to connect first
    started = loop.time()
    await node.call(addresses, PING_METHOD, Ping(), timeout=timeout)
    return loop.time() - started


async def in_turns(
    servers: Sequence[ServerInfo], work: Callable[[ServerInfo], Awaitable[None]], *, at_once: int
) -> None:
    """Do ``work`` for each server in order, for ``at_once`` of them at a time."""
    waiting = iter(servers)

    async def one_after_the_other() -> None:
        for server in waiting:
            await work(server)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(servers))):
            group.create_task(one_after_the_other())

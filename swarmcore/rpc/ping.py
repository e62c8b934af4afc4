"""Round trips to servers, measured."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from swarmcore.rpc.node import Node
from swarmcore.types import ServerInfo
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD

PINGS = 3
"""The shortest of them counts: the first may have to connect, and any may find one of the two ends busy."""

LIKE_BEFORE = 1.2
"""Times the round trip known before: a ping within that is not repeated."""


async def measure_round_trip(
    node: Node, server: ServerInfo, *, timeout: float, known: float | None = None
) -> float:
    """Seconds of the shortest of some pings to ``server``, each noted in `Node.response_times`.

    Raises as `Node.call` does.

    With the round trip ``known`` from before, one ping is enough that confirms it.
    """
    loop = asyncio.get_running_loop()
    shortest = float("inf")
    for _ in range(PINGS):
        started = loop.time()
        await node.call(server.dialable, PING_METHOD, Ping(), timeout=timeout)
        took = loop.time() - started
        node.response_times.of(server.peer).measured(took)
        shortest = min(shortest, took)
        if known is not None and shortest <= known * LIKE_BEFORE:
            break
    return shortest


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

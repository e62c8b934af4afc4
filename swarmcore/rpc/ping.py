"""Pings: how long a round trip to a peer takes, and whether it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from swarmcore.errors import DeadlineExceededError, SwarmError
from swarmcore.rpc.node import Node
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import Address, ServerInfo
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.method import Caller, Method, Rep, Req
from swarmcore.wire.protocols import PING_METHOD

PINGS = 3
"""The shortest of them counts: the first may have to connect, and any may find one of the two ends busy."""

LIKE_BEFORE = 1.2
"""Times the round trip known before: a ping within that is not repeated."""

ATTEMPTS = 2
"""Calls in a row that have to go unanswered: one may have met a connection that is dead."""

LONGEST = 30.0
"""Seconds after which a call is given up whatever is usual."""

TICK = 0.1
"""Seconds of waiting that count at a time: those in which this process was held up itself do not."""


async def answer_ping(request: Ping, caller: Caller) -> Pong:
    """Serve `PING_METHOD`."""
    return Pong(request.payload)


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


async def probe(
    node: Node, to: Sequence[Address], method: Method[Req, Rep], request: Req, *, least: float = 0.0
) -> Rep:
    """See whether a peer lives: its answer to a call that it is expected to answer at once.

    Each of `ATTEMPTS` calls is given the time that is usual for this peer, ``least`` seconds at least, and
    each twice as much as the one before, whose answer still counts. Raise `DeadlineExceededError` when none
    comes, whatever `Node.call` raises when it fails at once, and what the peer answers instead.
    """
    usual = node.response_times.of(to[0].peer)
    calls: list[asyncio.Task[Rep]] = []
    waited = 0.0
    try:
        for attempt in range(ATTEMPTS):
            allowed = max(usual.timeout, least) * 2**attempt
            calls.append(asyncio.create_task(_timed(node, to, method, request), name="probe of a peer"))
            if await _one_done(calls, allowed):
                return next(call for call in calls if call.done()).result()
            waited += allowed
    finally:
        await cancel_and_wait(*calls)
    usual.missed()
    raise DeadlineExceededError(f"no sign of life for {waited:.1f} s")


async def _timed(node: Node, to: Sequence[Address], method: Method[Req, Rep], request: Req) -> Rep:
    loop = asyncio.get_running_loop()
    began, usual = loop.time(), node.response_times.of(to[0].peer)
    try:
        reply = await node.call(to, method, request, timeout=LONGEST)
    except SwarmError as exc:
        if exc.origin is not None:  # a refusal is an answer, too
            usual.measured(loop.time() - began)
        raise
    usual.measured(loop.time() - began)
    return reply


async def _one_done(calls: Collection[asyncio.Task[Any]], seconds: float) -> bool:
    while seconds > 0:
        tick = min(seconds, TICK)
        done, _ = await asyncio.wait(calls, timeout=tick, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return True
        seconds -= tick
    return False

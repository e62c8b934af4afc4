"""Asking a peer whether it lives, and calling it silent only by what is usual for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from swarmcore.errors import DeadlineExceededError, SwarmError
from swarmcore.rpc.node import Node
from swarmcore.tasks import cancel_and_wait
from swarmcore.types import Address
from swarmcore.wire.method import Method, Rep, Req

ATTEMPTS = 2
"""Calls in a row that have to go unanswered: one may have met a connection that is dead."""

LONGEST = 30.0
"""Seconds after which a call is given up whatever is usual."""

TICK = 0.1
"""Seconds of waiting that count at a time: those in which this process was held up itself do not."""


async def ask(
    node: Node, to: Sequence[Address], method: Method[Req, Rep], request: Req, *, least: float = 0.0
) -> Rep:
    """The answer of a peer that is expected to answer at once.

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
            calls.append(asyncio.create_task(_timed(node, to, method, request), name="asking a peer"))
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

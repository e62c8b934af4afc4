"""Getting an answer from any one of several peers, the dead ones among them costing little time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from swarmcore.errors import PeerUnreachableError, SwarmError
from swarmcore.registry.partners import Partner, describe

T = TypeVar("T")

STAGGER = 0.3
"""Seconds that each peer is ahead of the next one."""
AT_ONCE = 8


async def first_answer(
    partners: Sequence[Partner],
    attempt: Callable[[Partner], Awaitable[T]],
    *,
    dispose: Callable[[T], object] = lambda answer: None,
) -> T:
    """The first answer that ``attempt`` gets from one of ``partners``, tried in their order.

    Each starts when the one before has failed or `STAGGER` seconds later; at most `AT_ONCE` run at a time.
    Those still under way at the end are cancelled, and an answer that comes second is given to ``dispose``.
    Raise `PeerUnreachableError`, naming all that was tried and why it failed, when there is no answer.
    """
    waiting = deque(partners)
    running: dict[asyncio.Task[T], Partner] = {}
    failures: list[str] = []
    try:
        while waiting or running:
            if waiting and len(running) < AT_ONCE:
                partner = waiting.popleft()
                running[asyncio.ensure_future(attempt(partner))] = partner
            patience = STAGGER if waiting and len(running) < AT_ONCE else None
            done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=list(running).index):
                try:
                    answer = task.result()
                except SwarmError as exc:
                    failures.append(f"{describe([running.pop(task)])} ({exc.message})")
                else:
                    del running[task]
                    return answer
    finally:
        for task in running:
            task.cancel()
        for late in await asyncio.gather(*running, return_exceptions=True):
            if not isinstance(late, BaseException):
                dispose(late)
    raise PeerUnreachableError(f"none of the peers to join through answers: {'; '.join(failures)}")

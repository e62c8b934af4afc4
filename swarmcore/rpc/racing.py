"""Several ways to the same end, tried one shortly after the other (as in RFC 8305)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from swarmcore.errors import SwarmError

T = TypeVar("T")


class NoSuccess(Exception):
    """Every attempt has failed."""


async def first_success(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    *,
    stagger: float,
    at_once: int,
    failed: Callable[[int, SwarmError], None],
    dispose: Callable[[T], object],
) -> T:
    """What the first of ``attempts`` to succeed returns. Raise `NoSuccess` when every one has failed.

    Each starts when the one before has failed or ``stagger`` seconds later; at most ``at_once`` run at a
    time. ``failed`` takes the place of an attempt and the `SwarmError` that ended it; another exception, or
    what ``failed`` raises, ends them all and comes out. Those still under way at the end are cancelled and
    awaited, and a success that comes second is given to ``dispose``.
    """
    running: dict[asyncio.Future[T], int] = {}
    try:
        answer = await _first(deque(enumerate(attempts)), running, stagger, at_once, failed)
    except BaseException:
        await _end(running, dispose)
        raise
    try:
        await _end(running, dispose)
    except BaseException:
        dispose(answer)
        raise
    return answer


async def _first(
    waiting: deque[tuple[int, Callable[[], Awaitable[T]]]],
    running: dict[asyncio.Future[T], int],
    stagger: float,
    at_once: int,
    failed: Callable[[int, SwarmError], None],
) -> T:
    while waiting or running:
        if waiting and len(running) < at_once:
            place, attempt = waiting.popleft()
            running[asyncio.ensure_future(attempt())] = place
        patience = stagger if waiting and len(running) < at_once else None
        done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: running[task]):
            place = running.pop(task)
            try:
                return task.result()
            except SwarmError as exc:
                failed(place, exc)
    raise NoSuccess


async def _end(running: Collection[asyncio.Future[T]], dispose: Callable[[T], object]) -> None:
    def ended(task: asyncio.Future[T]) -> None:
        if not task.cancelled() and task.exception() is None:
            dispose(task.result())

    for task in running:
        task.add_done_callback(ended)
        task.cancel()
    if running:
        await asyncio.wait(running)

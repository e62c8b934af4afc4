"""Ctrl-C, SIGTERM and the end of stdin: the first asks a command to end, the second ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from click.exceptions import Exit

from swarmcore.errors import InputError

T = TypeVar("T")

GRACE = 3.0
"""Seconds that an interrupted command usually has to close what it opened."""


class Interrupted(Exit):
    """A command was interrupted and has closed what it opened."""


def run(
    main: Coroutine[Any, Any, T],
    *,
    interrupted_status: int | None = None,
    exit_with_stdin: bool = False,
    grace: float | Callable[[], float] = GRACE,
) -> T:
    """Run ``main`` on a new event loop and return its result.

    The first SIGINT or SIGTERM cancels it; the second, or ``grace`` seconds without an end (a thread may be
    deep in a library), ends the process on the spot. ``grace`` may be a function, called when the first one
    comes. An interrupted command exits with 128 + the signal's
    number, as shells expect, or with ``interrupted_status``: 0 for a server, which has no other way to end.
    With ``exit_with_stdin`` the end of stdin is as good as a SIGTERM; raise `InputError` when stdin cannot be
    waited for.
    """
    received: list[int] = []

    async def supervised() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def stop(number: int, frame: FrameType | None) -> None:
            # A plain signal handler: unlike the loop's own it also runs while a callback hogs the loop.
            if received:
                os._exit(128 + number)
            received.append(number)
            seconds = grace() if callable(grace) else grace
            watchdog = threading.Timer(seconds, os._exit, (128 + number,))
            watchdog.daemon = True
            watchdog.start()
            loop.call_soon_threadsafe(task.cancel)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if exit_with_stdin:
            try:
                _at_end_of_stdin(loop, lambda: stop(signal.SIGTERM, None))
            except InputError:
                main.close()
                raise
        return await main

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with asyncio.Runner() as runner:
            return runner.run(supervised())
    except (asyncio.CancelledError, KeyboardInterrupt):
        if not received:
            raise
        raise Interrupted(128 + received[0] if interrupted_status is None else interrupted_status) from None
    finally:
        if not received:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _at_end_of_stdin(loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
    def readable() -> None:
        if not os.read(0, 65536):
            loop.remove_reader(0)
            ended()

    try:
        loop.add_reader(0, readable)
    except OSError as exc:
        raise InputError(
            "--exit-with-stdin needs a stdin that can end: a pipe, not a file or nothing"
        ) from exc


async def finished(main: Coroutine[Any, Any, None]) -> bool:
    """Run ``main`` to its end, or to a Ctrl-C, which ends only that. Return whether it got to its end."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(main)
    previous = signal.signal(signal.SIGINT, lambda number, frame: loop.call_soon_threadsafe(task.cancel))
    try:
        await asyncio.wait([task])
    finally:
        signal.signal(signal.SIGINT, previous)
        task.cancel()
        await asyncio.wait([task])
    if task.cancelled():
        return False
    task.result()
    return True

"""An event loop in a thread of its own, for callers that cannot await."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from swarmcore.errors import InputError, SwarmError

logger = logging.getLogger(__name__)

CLEANUP_SECONDS = 5.0
"""How long a call that was interrupted may take to clean up after itself."""

T = TypeVar("T")


class Closable(Protocol):
    """What is open on the loop until it is closed, from another thread."""

    def close(self) -> None: ...


class LoopThread:
    """An event loop in a daemon thread, and calls into it from other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarmcore-sync", daemon=True)
        self._thread.start()
        self._open: set[Closable] = set()
        atexit.register(self.stop)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` on the loop and wait for its result.

        An exception here, such as KeyboardInterrupt, cancels it, and waits until it has cleaned up.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise InputError(
                "a call that waits was made on the loop that it waits for; use the asynchronous API"
            )
        return wait_on(self._loop, coroutine)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the loop and wait for its result."""

        async def called() -> T:
            return function()

        return self.run(called())

    def opened(self, thing: Closable) -> None:
        """Close ``thing`` when the process ends, unless it is closed before."""
        self._open.add(thing)

    def closed(self, thing: Closable) -> None:
        self._open.discard(thing)

    def stop(self) -> None:
        """Close what is open, and end the thread."""
        atexit.unregister(self.stop)
        for thing in list(self._open):
            try:
                thing.close()
            except SwarmError as exc:
                logger.warning("%r did not close in good order: %s", thing, exc)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLEANUP_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


def wait_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` on a loop that runs in another thread, and wait for its result.

    An exception here, such as KeyboardInterrupt, cancels it, and waits until it has cleaned up.
    """
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        tasks.append(loop.create_task(coroutine))
        tasks[0].add_done_callback(functools.partial(_copy_result, answer))

    def stop() -> None:
        for task in tasks:
            task.cancel()

    try:
        # Within, since it may be interrupted from the moment on that the work has begun.
        loop.call_soon_threadsafe(start)
        return answer.result()
    except BaseException:
        if not answer.done():
            loop.call_soon_threadsafe(stop)
            concurrent.futures.wait([answer], timeout=CLEANUP_SECONDS)
        raise


@functools.cache
def background_loop() -> LoopThread:
    """The one of this process, started when it is first needed."""
    return LoopThread()


def _copy_result(answer: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        answer.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())

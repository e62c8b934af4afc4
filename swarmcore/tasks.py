"""Tasks that end with their owner, none of them in silence; waits that end in our own error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, TypeVar

from swarmcore.errors import DeadlineExceededError, SwarmError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def loop_time() -> float:
    """The clock of the running event loop, in seconds."""
    return asyncio.get_running_loop().time()


class Deadline:
    """A time limit on a block, which raises an error of ours in place of asyncio's when it passes.

    A `TimeoutError` that the block itself raises goes through as it is. Entered, it gives the
    `asyncio.Timeout` that it runs on, for `asyncio.Timeout.reschedule`.
    """

    def __init__(self, timeout: asyncio.Timeout, error: str | Callable[[], Exception]) -> None:
        self._timeout = timeout
        self._error = error

    async def __aenter__(self) -> asyncio.Timeout:
        return await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, exc, traceback)
        except TimeoutError as late:
            raise (
                DeadlineExceededError(self._error) if isinstance(self._error, str) else self._error()
            ) from late


def deadline_after(seconds: float | None, error: str | Callable[[], Exception]) -> Deadline:
    """When the block takes longer, raise `DeadlineExceededError` with this message, or what ``error`` makes.

    Without ``seconds`` there is no limit until one is set by `asyncio.Timeout.reschedule`.
    """
    return Deadline(asyncio.timeout(seconds), error)


def deadline_at(when: float | None, error: str | Callable[[], Exception]) -> Deadline:
    """As `deadline_after`, for a time of the loop's clock."""
    return Deadline(asyncio.timeout_at(when), error)


async def wait_until_set(event: asyncio.Event, seconds: float) -> bool:
    """Whether ``event`` is set, now or in the next ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return event.is_set()


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel those of ``tasks`` that run, and wait until all have ended.

    What they raise is not raised here; errors other than ours are bugs, and are logged.
    """
    ending = [task for task in tasks if task is not None]
    for task in ending:
        task.cancel()
    for task, result in zip(ending, await asyncio.gather(*ending, return_exceptions=True), strict=True):
        if isinstance(result, Exception) and not isinstance(result, SwarmError):
            _log_failure(task, result)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, T], name: str) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``work`` in a task beside the block; at the end of the block it is cancelled and awaited.

    The block goes on when it ends before, in whatever way: see `cancel_and_wait`.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        await cancel_and_wait(task)


def _log_failure(task: asyncio.Task[Any], exc: BaseException) -> None:
    logger.error("%s ended unexpectedly", task.get_name(), exc_info=exc)


class BackgroundTasks:
    """Holds on to tasks, logs the ones that fail, cancels what is left at the end."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order, so that a simulation repeats itself
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run ``work`` in a task of its own; after `close` it is dropped."""
        if self._closed:
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (exc := task.exception()) is not None:
            _log_failure(task, exc)

    def cancel(self) -> None:
        """Cancel all tasks but the one that runs, and start no more."""
        self._closed = True
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self) -> None:
        """Cancel all tasks and wait for them. Harmless when repeated."""
        self.cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:  # not gather, which would cancel them again, in a circle when two of them close their owner
            await asyncio.wait(tasks)

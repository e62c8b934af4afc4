"""An event loop on virtual time: when everything waits, its clock jumps to the next timer.

Hours of announcements, timeouts and retries then take milliseconds, and a run with seeded randomness repeats
exactly::

    clock.run(scenario())             # instead of asyncio.run

Everything that follows the rule of this package, *time comes from the loop*, runs on it unchanged. It is for
programs whose tasks talk through memory: an operating system socket has no part in virtual time, and a timer
that guards one would fire before its bytes can arrive.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HORIZON = 24 * 3600.0

_LOOK_EVERY = 64  # turns of the loop between looks at its files, when it has none of its own


class VirtualTimeError(RuntimeError):
    """The program can never finish: all its tasks wait with no timer set, or time ran past the horizon."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time` starts at ``start`` and moves only when no callback is ready to run.

    Work given to `run_in_executor` (and so to `asyncio.to_thread`) takes no virtual time: the clock stands
    until it is done. Without ``threads`` the loop does it at once itself, so that the order in which several
    pieces of it end is always the same.

    `VirtualTimeError` is raised out of ``run_until_complete`` when every task waits and there is no timer
    that could wake one, and when the clock would pass ``start + horizon`` seconds: a program with periodic
    timers that waits for something that never comes would otherwise run for ever.
    """

    def __init__(self, start: float = 0.0, *, horizon: float = HORIZON, threads: bool = True) -> None:
        self._now = start
        self._threads = threads
        self._end = start + horizon
        self._threads_at_work = 0
        super().__init__(_JumpingSelector(self._pass_time))

    def time(self) -> float:
        return self._now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        if not self._threads:
            return self._done_at_once(func, *args)
        future = super().run_in_executor(executor, func, *args)
        self._threads_at_work += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        self._threads_at_work += 1  # a thread waits for the others to end
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._threads_at_work -= 1

    def _done_at_once(self, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:
            future.set_exception(exc)
        return future

    def _thread_done(self, _: asyncio.Future[Any]) -> None:
        self._threads_at_work -= 1

    def _pass_time(self, timeout: float | None) -> bool:
        """Move the clock by ``timeout``; False when the loop has to wait in real time instead."""
        if self._threads_at_work:
            return False
        if timeout is None:
            raise VirtualTimeError("every task waits and no timer is set: nothing can ever happen again")
        if self._now + timeout > self._end:
            raise VirtualTimeError(f"still running after {self._end - self._now:.0f} more virtual seconds")
        self._now += timeout
        return True


class _JumpingSelector(selectors.BaseSelector):
    """The system's selector, except that it passes virtual time rather than wait."""

    def __init__(self, pass_time: Callable[[float | None], bool]) -> None:
        self._selector = selectors.DefaultSelector()
        self._files = self._selector.get_map()
        self._pass_time = pass_time
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own wake-up pipe needs no haste: what it announces is in the loop's queue already.
        self._turns += 1
        if timeout is None or len(self._files) > 1 or self._turns % _LOOK_EVERY == 0:
            ready = self._selector.select(0)
            if ready:
                return ready
        if timeout == 0:
            return []
        return [] if self._pass_time(timeout) else self._selector.select(None)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self._selector.close()


def run(
    main: Coroutine[Any, Any, T], *, start: float = 0.0, horizon: float = HORIZON, threads: bool = True
) -> T:
    """`asyncio.run` on a `VirtualClockLoop`: run ``main`` to its end, cancel what it left, close the loop."""
    with asyncio.Runner(
        loop_factory=lambda: VirtualClockLoop(start, horizon=horizon, threads=threads)
    ) as runner:
        return runner.run(main)

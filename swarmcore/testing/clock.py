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
import contextvars
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HORIZON = 24 * 3600.0

_MANY = 100  # timers that were cancelled, before it is worth the time to clear them away
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
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timers_set = 0
        self._timers_cancelled = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    # Timers are most of what a simulation does. The base class would compare them in Python, and take a turn
    # of the loop to get one from its queue into the other.

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        timer = _Timer(self, when, callback, args, context or contextvars.copy_context())
        self._timers_set += 1
        heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def count_cancelled(self) -> None:
        """A timer in the queue was cancelled."""
        self._timers_cancelled += 1
        if self._timers_cancelled > _MANY and 2 * self._timers_cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].pending]
            heapify(self._timers)
            self._timers_cancelled = 0

    def run_due(self) -> bool:
        """Run all timers that are due now; whether there were any."""
        last, ran = self._timers_set, False
        while self._timers and self._timers[0][0] <= self._now and self._timers[0][1] <= last:
            timer = heappop(self._timers)[2]
            if timer.pending:
                ran = True
                timer.run()
            else:
                self._timers_cancelled -= 1
        return ran

    def waits_for_time(self) -> bool:
        """Whether any timer is set."""
        while self._timers and not self._timers[0][2].pending:
            heappop(self._timers)
            self._timers_cancelled -= 1
        return bool(self._timers)

    def pass_time(self) -> bool:
        """Move the clock to the next timer and run it; False when the loop has to wait in real time instead.

        Raise `VirtualTimeError` when there is no timer, or it is past the horizon.
        """
        if self._threads_at_work:
            return False
        if not self.waits_for_time():
            raise VirtualTimeError("every task waits and no timer is set: nothing can ever happen again")
        when = self._timers[0][0]
        if when > self._end:
            raise VirtualTimeError(f"still running after {self._end - self._now:.0f} more virtual seconds")
        self._now = max(self._now, when)
        self.run_due()
        return True

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


class _Timer(asyncio.TimerHandle):
    """One entry in the queue of a `VirtualClockLoop`."""

    __slots__ = ("_args_", "_at", "_callback_", "_cancelled_", "_context_", "_owner", "pending")

    def __init__(
        self,
        owner: VirtualClockLoop,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
    ) -> None:
        # That of the base class is left out: it keeps the same for another queue.
        self._owner = owner
        self._at = when
        self._callback_ = callback
        self._args_ = args
        self._context_ = context
        self._cancelled_ = False
        self.pending = True

    def when(self) -> float:
        return self._at

    def cancelled(self) -> bool:
        return self._cancelled_

    def cancel(self) -> None:
        if self.pending:
            self.pending, self._cancelled_ = False, True
            self._callback_ = _nothing
            self._args_ = ()
            self._owner.count_cancelled()

    def run(self) -> None:
        self.pending = False
        try:
            self._context_.run(self._callback_, *self._args_)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            message = f"Exception in timer {self._callback_!r}"
            self._owner.call_exception_handler({"message": message, "exception": exc, "handle": self})

    def __repr__(self) -> str:
        return f"<_Timer at {self._at:.3f} {self._callback_!r}{'' if self.pending else ' through'}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _nothing() -> None:
    pass


class _JumpingSelector(selectors.BaseSelector):
    """The system's selector, except that it passes virtual time rather than wait."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        self._selector = selectors.DefaultSelector()
        self._files = self._selector.get_map()
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own wake-up pipe needs no haste: what it announces is in the loop's queue already.
        self._turns += 1
        last_hope = timeout is None and not self._loop.waits_for_time()
        if last_hope or len(self._files) > 1 or self._turns % _LOOK_EVERY == 0:
            ready = self._selector.select(0)
            if ready:
                return ready
        if self._loop.run_due() or timeout == 0 or self._loop.pass_time():
            return []
        return self._selector.select(None)

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

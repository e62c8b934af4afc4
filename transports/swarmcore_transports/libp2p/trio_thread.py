"""A trio event loop in a thread of its own, and the calls that asyncio makes into it.

py-libp2p runs on trio only. Everything that touches trio or libp2p runs in that thread; asyncio sees plain
awaitables with deadlines, and only errors of `swarmcore.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import trio

from swarmcore.errors import ConnectionLostError, StreamClosedError, SwarmError
from swarmcore.tasks import deadline_after
from swarmcore_transports.libp2p.translation import translated

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_END_SECONDS = 10.0
"""How long the trio side may take to end before the thread is left to itself."""


class TrioThread:
    """Runs ``main`` in trio for as long as it lives, beside a nursery for what is started later.

    ``main(ready, stop)`` sets up, calls ``ready()`` once calls may be made, and cleans up and returns when
    the event ``stop`` is set. When it or anything started beside it fails, that is a crash: every call, now
    and later, raises one `ConnectionLostError` with the reason, and ``on_crash`` is called with it on the
    asyncio side.
    """

    def __init__(
        self,
        main: Callable[[Callable[[], None], trio.Event], Awaitable[None]],
        *,
        name: str,
        on_crash: Callable[[SwarmError], None],
    ) -> None:
        self._main = main
        self._name = name
        self._on_crash = on_crash
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop = trio.Event()
        self._ended: asyncio.Future[None] | None = None
        self._calls: set[asyncio.Future[Any]] = set()
        self._closing = False
        self.crash: SwarmError | None = None
        """Why the trio side ended by itself; None while it has not."""

    @property
    def running(self) -> bool:
        return self._nursery is not None and self.crash is None and not self._closing

    async def start(self, timeout: float) -> None:
        """Start the thread and wait until ``main`` is ready; raise what it raised when it is not."""
        loop = self._loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        ready: asyncio.Future[None] = loop.create_future()
        self._calls.add(ready)
        self._thread = threading.Thread(target=self._run, args=(ready,), name=self._name, daemon=True)
        self._thread.start()
        try:
            async with deadline_after(timeout, f"libp2p did not start within {timeout:g} s"):
                await ready
        except BaseException:
            await self.close()
            raise
        finally:
            self._calls.discard(ready)

    def _run(self, ready: asyncio.Future[None]) -> None:
        error: SwarmError | None = None
        try:
            trio.run(self._trio_main, ready)
        except BaseException as exc:
            error = translated(exc)
            error.__cause__ = exc
        finally:
            with contextlib.suppress(RuntimeError):  # the asyncio loop was closed without this bridge
                assert self._loop
                self._loop.call_soon_threadsafe(self._trio_ended, error)

    async def _trio_main(self, ready: asyncio.Future[None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._closing:
                self._stop.set()
            await self._main(partial(self.call_soon_asyncio, _settle, ready, None), self._stop)
            nursery.cancel_scope.cancel()

    def _trio_ended(self, error: SwarmError | None) -> None:
        assert self._ended
        if not self._closing:
            reason = error.message if error else "it ended by itself"
            self.crash = ConnectionLostError(f"libp2p has failed: {reason}; make a new transport")
            self.crash.__cause__ = error
            starting = next(iter(self._calls), None)
            logger.debug("libp2p has failed", exc_info=error)
            for call in tuple(self._calls):
                if not call.done():
                    call.set_exception(error if error and call is starting else self.crash)
            self._on_crash(self.crash)
        else:
            for call in tuple(self._calls):
                if not call.done():
                    call.set_exception(StreamClosedError("this transport is closed"))
        if not self._ended.done():
            self._ended.set_result(None)

    # --- from asyncio to trio -------------------------------------------------------------------------

    async def call(
        self,
        function: Callable[[*Ts], Awaitable[T]],
        *arguments: *Ts,
        timeout: float,
        what: str,
        unwanted: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """Await ``function(*arguments)`` in trio.

        ``timeout`` seconds bound it, after which it is cancelled there and `DeadlineExceededError` names
        ``what``. Cancelling this cancels it as well. Raise what it raises, translated. What it returns too
        late for either is given to ``unwanted``, in trio, which may not raise.
        """
        self._check_running()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        scope = trio.CancelScope()

        async def run() -> None:
            error: SwarmError | None = None
            result: T | None = None
            with scope:
                try:
                    result = await function(*arguments)
                except Exception as exc:
                    error = translated(exc)
                    error.__cause__ = exc if error is not exc else exc.__cause__
            if scope.cancelled_caught:
                error = StreamClosedError(f"{what} was given up")
            self.call_soon_asyncio(settle, error, result)

        def settle(error: SwarmError | None, result: Any) -> None:
            if outcome.done() and error is None and unwanted:
                self.start_soon(unwanted, result)
            _settle(outcome, error, result)

        def begin() -> None:
            assert self._nursery
            self._nursery.start_soon(run)

        taken = False
        self._calls.add(outcome)
        try:
            self.call_soon_trio(begin)
            async with deadline_after(timeout, f"{what} took longer than {timeout:g} s"):
                returned = await outcome
                taken = True
                return returned
        finally:
            self._calls.discard(outcome)
            if not outcome.done() or outcome.cancelled():
                self.call_soon_trio(scope.cancel)
            elif not taken and unwanted and outcome.exception() is None:
                self.start_soon(unwanted, outcome.result())

    def start_soon(self, function: Callable[[*Ts], Awaitable[None]], *arguments: *Ts) -> None:
        """Run ``function`` in trio's background. It may not raise: that would be a crash of everything."""

        def begin() -> None:
            if self._nursery and not self._nursery.cancel_scope.cancel_called:
                self._nursery.start_soon(function, *arguments)

        self.call_soon_trio(begin)

    def call_soon_trio(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call ``function`` soon on the trio side; nothing happens when that has ended."""
        if self._token:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *arguments)

    def _check_running(self) -> None:
        if self.crash:
            raise ConnectionLostError(self.crash.message) from self.crash.__cause__
        if not self.running:
            raise StreamClosedError("this transport is closed")

    # --- from trio to asyncio -------------------------------------------------------------------------

    def call_soon_asyncio(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call ``function`` soon on the asyncio side; nothing happens when its loop has been closed."""
        assert self._loop
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    # --- the end --------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let ``main`` end, cancel all else on the trio side, and join the thread. Harmless when repeated."""
        self._closing = True
        if self._thread is None or self._ended is None:
            return

        def give_up() -> None:
            if self._nursery:
                self._nursery.cancel_scope.cancel()

        self.call_soon_trio(self._stop.set)
        done, _ = await asyncio.wait([self._ended], timeout=_END_SECONDS)
        if not done:
            self.call_soon_trio(give_up)
            done, _ = await asyncio.wait([self._ended], timeout=_END_SECONDS)
        if not done:
            logger.error("libp2p did not end within %g s; its thread is left behind", _END_SECONDS)
            return
        self._thread.join()


def _settle(future: asyncio.Future[Any], error: BaseException | None, result: Any = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)

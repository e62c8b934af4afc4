"""How many micro-batches may be under way at a time, and whose turn it is when one is through."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs


@attrs.define(eq=False)
class Call:
    """Micro-batches that somebody asked for together."""

    under_way: int = 0
    waiting: deque[asyncio.Future[None]] = attrs.field(factory=deque, repr=False)


class FairLimiter:
    """Limits how many micro-batches are under way, shared evenly by all calls that have some left to do.

    Whichever call has the fewest under way goes next, so that a backward pass does not wait until a long
    forward pass of somebody else is through. ``slots`` is asked each time, since servers come and go.
    """

    def __init__(self, slots: Callable[[], int]) -> None:
        self._slots = slots
        self._under_way = 0
        self._calls: dict[Call, None] = {}
        """Those that wait for a slot, the one longest without a turn first."""

    @asynccontextmanager
    async def slot(self, call: Call) -> AsyncIterator[None]:
        """A slot for one micro-batch of ``call``; wait until one is free."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call.waiting.append(turn)
        self._calls.setdefault(call)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # its turn never came, and is passed over when it does
                raise
            self._left(call)
            raise
        try:
            yield
        finally:
            self._left(call)

    def _left(self, call: Call) -> None:
        call.under_way -= 1
        self._under_way -= 1
        self._admit()

    def _admit(self) -> None:
        slots = self._slots()
        while self._calls and self._under_way < slots:
            call = min(self._calls, key=lambda each: each.under_way)
            turn = call.waiting.popleft()
            del self._calls[call]
            if call.waiting:
                self._calls[call] = None  # behind the others
            if not turn.done():
                call.under_way += 1
                self._under_way += 1
                turn.set_result(None)

    def __repr__(self) -> str:
        waiting = sum(len(call.waiting) for call in self._calls)
        return f"<FairLimiter {self._under_way}/{self._slots()} under way · {waiting} waiting>"

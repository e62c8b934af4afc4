"""From code that cannot await, such as a module's ``forward`` or autograd, to the batches of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.planner import BatchPlanner
from swarmcore.client.connection import SwarmConnection
from swarmcore.errors import InputError, StreamClosedError
from swarmcore.loop_thread import background_loop, wait_on
from swarmcore.types import ModelInfo

T = TypeVar("T")


def batch_runner(swarm: SwarmConnection, model: ModelInfo, options: PassOptions | None = None) -> BatchRunner:
    """What runs batches through blocks of ``model`` and back, over a connection; without torch."""
    sessions = swarm.planner(model)
    planner = BatchPlanner(swarm.registry, swarm.health, model, sessions, admits=swarm.router.admits)
    return BatchRunner(swarm.node, planner, model, options, pass_id=swarm.session_id)


class Bridge:
    """Runs work of one model's batches on an event loop, for callers in any thread and inside any loop.

    A caller that blocks must not block the loop that works for it. So what it asks for runs in the thread of
    `background_loop`, over a connection to the swarm of its own (`SwarmConnection.connect_again`), made at
    the first call; a swarm that lives there already needs none. Only where a swarm cannot be joined again,
    since it was put together by hand, does the work run on its own loop; blocking calls from that loop's
    thread are refused.
    """

    def __init__(self, swarm: SwarmConnection, model: ModelInfo, options: PassOptions | None = None) -> None:
        """To be made on the loop that ``swarm`` lives on."""
        self._swarm, self._model = swarm, model
        self.options = options or PassOptions()
        self._own_loop = asyncio.get_running_loop()
        self._joining = asyncio.Lock()
        self._joined: SwarmConnection | None = None
        self._runner: BatchRunner | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Bridge {self._model.name} · {self._runner or 'nothing run yet'}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of a module go over the same connection

    def run(self, work: Callable[[BatchRunner], Coroutine[Any, Any, T]]) -> T:
        """Wait for ``work``. Raise `InputError` where waiting could never end."""
        loop = self._loop()
        if _running_loop() is loop:
            raise InputError(
                "this would block the event loop that the swarm lives on; await forward_async, or call it "
                "from another thread: await asyncio.to_thread(…)"
            )
        return wait_on(loop, self._with_runner(work))

    async def run_async(self, work: Callable[[BatchRunner], Coroutine[Any, Any, T]]) -> T:
        """Await ``work``; from any loop."""
        loop = self._loop()
        if asyncio.get_running_loop() is loop:
            return await self._with_runner(work)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._with_runner(work), loop))

    async def close(self) -> None:
        """Leave the swarm, if it was joined again here. Harmless when repeated."""
        self._closed = True
        joined, self._joined, self._runner = self._joined, None, None
        if joined is not None:
            leaving = asyncio.run_coroutine_threadsafe(joined.close(), background_loop().loop)
            await asyncio.wrap_future(leaving)

    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._own_loop if self._swarm.connect_again is None else background_loop().loop

    async def _with_runner(self, work: Callable[[BatchRunner], Coroutine[Any, Any, T]]) -> T:
        if self._closed:
            raise StreamClosedError("the model is closed; load it again")
        swarm = await self._joined_swarm()
        if self._runner is None:
            self._runner = batch_runner(swarm, self._model, self.options)
        return await work(self._runner)

    async def _joined_swarm(self) -> SwarmConnection:
        if self._swarm.connect_again is None or asyncio.get_running_loop() is self._own_loop:
            return self._swarm
        async with self._joining:
            if self._joined is None:
                self._joined = await self._swarm.connect_again()
            return self._joined


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

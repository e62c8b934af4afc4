"""Calls into trio that end too late for whoever made them: what they return is not lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio

from swarmcore.errors import SwarmError
from swarmcore_transports.libp2p.trio_thread import TrioThread


async def live(ready: Callable[[], None], stop: trio.Event) -> None:
    ready()
    await stop.wait()


def crashed(error: SwarmError) -> None:
    raise AssertionError(error)


@pytest.fixture
async def thread() -> AsyncIterator[TrioThread]:
    thread = TrioThread(live, name="late calls", on_crash=crashed)
    await thread.start(5.0)
    yield thread
    await thread.close()


async def open_at_once() -> str:
    return "stream"


@pytest.mark.parametrize("settled", [False, True], ids=["before it has arrived", "after"])
async def test_what_a_cancelled_call_returns_is_unwanted(
    thread: TrioThread, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    loop = asyncio.get_running_loop()
    dropped: asyncio.Future[str] = loop.create_future()
    told, call_soon_asyncio = threading.Event(), thread.call_soon_asyncio

    async def drop(result: str) -> None:
        loop.call_soon_threadsafe(dropped.set_result, result)

    def tell_and_say_so(*arguments: Any) -> None:
        call_soon_asyncio(*arguments)
        told.set()

    monkeypatch.setattr(thread, "call_soon_asyncio", tell_and_say_so)
    calling = asyncio.create_task(thread.call(open_at_once, timeout=5.0, what="opening", unwanted=drop))
    await asyncio.sleep(0)
    assert told.wait(5.0)  # what it returns waits in the queue of this loop
    if settled:
        loop.call_soon(calling.cancel)
    else:
        calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await asyncio.wait_for(dropped, 5.0) == "stream"


async def test_what_is_returned_in_time_is_kept(thread: TrioThread) -> None:
    async def drop(result: str) -> None:
        raise AssertionError(result)

    assert await thread.call(open_at_once, timeout=5.0, what="opening", unwanted=drop) == "stream"

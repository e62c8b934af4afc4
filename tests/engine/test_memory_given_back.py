"""Memory that bursts of sessions leave free goes back to the system once there is nothing to do."""

from __future__ import annotations

import asyncio

import pytest
from counting_engine import run, running, some_rows

from swarmcore.engine import loop
from swarmcore.engine.loop import QUIET, ROWS_TO_TIDY

pytestmark = pytest.mark.virtual_time


async def test_when_it_is_quiet_once_for_each_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now = asyncio.get_running_loop().time
    monkeypatch.setattr(loop, "give_back_memory", lambda: given.append(now()))
    async with running(cache_tokens=2 * ROWS_TO_TIDY) as (engine, _):
        await engine.open("a", 1, 0, 1.0)
        await run(engine, "a", 0, some_rows(ROWS_TO_TIDY - 2))
        await asyncio.sleep(3 * QUIET)
        assert not given, "too little for that"
        for position in range(ROWS_TO_TIDY - 2, ROWS_TO_TIDY + 4):
            await asyncio.sleep(0.6 * QUIET)
            assert not given, "it is at work"
            await run(engine, "a", position, some_rows(1))
        ended = now()
        await asyncio.sleep(50 * QUIET)
        assert given == [pytest.approx(ended + QUIET)]
        await run(engine, "a", 0, some_rows(ROWS_TO_TIDY))
        engine.close_session("a")
        await asyncio.sleep(2 * QUIET)
        assert len(given) == 2

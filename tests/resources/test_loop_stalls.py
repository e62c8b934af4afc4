"""What holds the event loop up is counted, by its place, and logged at a bounded rate."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import time

import pytest

from swarmcore.resources.loop_stalls import ELSEWHERE, THRESHOLD, WARNED, LoopStalls, watch_loop


def test_stalls_are_counted_by_place_and_said_once_a_minute() -> None:
    loop_stalls = LoopStalls()
    assert loop_stalls.note == ""
    said = [loop_stalls.stalled(1.2, "decode", now) for now in range(120)]
    assert [bool(line) for line in said].count(True) == 2
    assert said[60] == "the event loop was held up for 1200 ms by decode; 60 times since this was last said"
    loop_stalls.stalled(1.8, "other", 121.0)
    assert loop_stalls.note == "event loop: held up 121 times, for 1800 ms at most; 120 times by decode"


def test_what_is_short_or_not_the_loops_own_is_counted_alone() -> None:
    loop_stalls = LoopStalls()
    assert not loop_stalls.stalled(0.9 * WARNED, "decode", 0.0)
    assert not loop_stalls.stalled(9 * WARNED, ELSEWHERE, 1.0)
    assert (loop_stalls.count, loop_stalls.note) == (2, "")
    assert loop_stalls.stalled(WARNED, "decode", 2.0) == "the event loop was held up for 1000 ms by decode"


def test_no_more_places_are_remembered_than_there_is_room_for() -> None:
    loop_stalls = LoopStalls()
    for number in range(1000):
        loop_stalls.stalled(0.2, "often", number)
        loop_stalls.stalled(0.2, f"place {number}", number)
    assert len(loop_stalls.places) <= 64
    assert loop_stalls.places["often"] == 1000


@pytest.mark.parametrize("places", [False, True])
async def test_a_callback_that_blocks_is_on_alarm(
    places: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcore.resources.loop_stalls.WARNED", 2 * THRESHOLD)
    loop_stalls = LoopStalls()

    def block() -> None:
        end = time.monotonic() + 4 * THRESHOLD
        while time.monotonic() < end:
            pass

    with watch_loop(loop_stalls, places=places):
        await asyncio.sleep(0.06)
        block()
        while not loop_stalls.count:
            await asyncio.sleep(0.01)
    assert loop_stalls.longest > THRESHOLD
    [record] = caplog.records
    assert "held up" in record.message
    if places:
        assert any("block" in place for place in loop_stalls.places)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM, no usleep")
async def test_a_thread_that_lets_no_other_run_is_no_callback(caplog: pytest.LogCaptureFixture) -> None:
    """As an import of torch does. `PyDLL` keeps the interpreter's lock while it calls."""
    loop_stalls = LoopStalls()

    def hold() -> None:
        time.sleep(0.02)  # until the loop, which started this thread, has nothing to do
        ctypes.PyDLL(None).usleep(int(4e6 * THRESHOLD))

    with watch_loop(loop_stalls, places=True):
        await asyncio.sleep(0.06)
        await asyncio.to_thread(hold)
        while not loop_stalls.count:
            await asyncio.sleep(0.01)
    assert ELSEWHERE in loop_stalls.places
    assert not caplog.records

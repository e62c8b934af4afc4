"""What holds the event loop up is counted, by its place, and logged at a bounded rate."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import time

import pytest

from swarmcore.resources.hold_ups import ELSEWHERE, THRESHOLD, WARNED, HoldUps, watching


def test_hold_ups_are_counted_by_place_and_said_once_a_minute() -> None:
    hold_ups = HoldUps()
    assert hold_ups.note == ""
    said = [hold_ups.held(1.2, "decode", now) for now in range(120)]
    assert [bool(line) for line in said].count(True) == 2
    assert said[60] == "the event loop was held up for 1200 ms by decode; 60 times since this was last said"
    hold_ups.held(1.8, "other", 121.0)
    assert hold_ups.note == "event loop: held up 121 times, for 1800 ms at most; 120 times by decode"


def test_what_is_short_or_not_the_loops_own_is_counted_alone() -> None:
    hold_ups = HoldUps()
    assert not hold_ups.held(0.9 * WARNED, "decode", 0.0)
    assert not hold_ups.held(9 * WARNED, ELSEWHERE, 1.0)
    assert (hold_ups.count, hold_ups.note) == (2, "")
    assert hold_ups.held(WARNED, "decode", 2.0) == "the event loop was held up for 1000 ms by decode"


def test_no_more_places_are_remembered_than_there_is_room_for() -> None:
    hold_ups = HoldUps()
    for number in range(1000):
        hold_ups.held(0.2, "often", number)
        hold_ups.held(0.2, f"place {number}", number)
    assert len(hold_ups.places) <= 64
    assert hold_ups.places["often"] == 1000


@pytest.mark.parametrize("places", [False, True])
async def test_a_callback_that_blocks_is_seen(
    places: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcore.resources.hold_ups.WARNED", 2 * THRESHOLD)
    hold_ups = HoldUps()

    def block() -> None:
        end = time.monotonic() + 4 * THRESHOLD
        while time.monotonic() < end:
            pass

    with watching(hold_ups, places=places):
        await asyncio.sleep(0.06)
        block()
        while not hold_ups.count:
            await asyncio.sleep(0.01)
    assert hold_ups.longest > THRESHOLD
    [record] = caplog.records
    assert "held up" in record.message
    if places:
        assert any("block" in place for place in hold_ups.places)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGALRM, no usleep")
async def test_a_thread_that_lets_no_other_run_is_no_callback(caplog: pytest.LogCaptureFixture) -> None:
    """As an import of torch does. `PyDLL` keeps the interpreter's lock while it calls."""
    hold_ups = HoldUps()

    def hold() -> None:
        time.sleep(0.02)  # until the loop, which started this thread, has nothing to do
        ctypes.PyDLL(None).usleep(int(4e6 * THRESHOLD))

    with watching(hold_ups, places=True):
        await asyncio.sleep(0.06)
        await asyncio.to_thread(hold)
        while not hold_ups.count:
            await asyncio.sleep(0.01)
    assert ELSEWHERE in hold_ups.places
    assert not caplog.records

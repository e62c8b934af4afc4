"""How many rows of prefill go into a batch, on machines of every speed."""

from __future__ import annotations

import pytest

from swarmcore.executor.prefill_pacing import FIRST, LONGEST, PrefillPacing

SPEEDS = [1.0, 10.0, 1e2, 1e3, 1e4, 1e5]


def batches(
    speed: float, *, rows: int = 4096, overhead: float = 0.0, decode_seconds: float = 0.0
) -> list[tuple[int, float]]:
    """Rows and seconds of the batches of a long prompt; with ``decode_seconds`` others decode meanwhile."""
    pacing, now, found = PrefillPacing(), 0.0, []
    while rows:
        taken = min(pacing.rows(now, decode_seconds), rows, 512)
        seconds = overhead + taken / speed
        now += seconds
        pacing.note_batch(taken, seconds, decodes=decode_seconds > 0, prefills=True, now=now)
        found.append((taken, seconds))
        rows -= taken
    return found


@pytest.mark.parametrize("speed", SPEEDS)
def test_no_batch_takes_long_but_the_first_ones_of_a_slow_machine(speed: float) -> None:
    found = batches(speed)
    assert found[0][0] == FIRST
    assert all(seconds <= LONGEST + 1 / speed for _, seconds in found[1:])


@pytest.mark.parametrize("speed", [1e3, 1e4, 1e5])
def test_a_fast_machine_soon_has_whole_batches(speed: float) -> None:
    assert max(taken for taken, _ in batches(speed, overhead=0.01)[:6]) >= 0.9 * min(512, speed)


@pytest.mark.parametrize("speed", [1e2, 1e3, 1e4])
def test_batches_are_short_while_others_decode(speed: float) -> None:
    found = batches(speed, decode_seconds=0.05)
    assert all(seconds <= 0.2 + 1 / speed for _, seconds in found[1:])
    assert sum(taken for taken, _ in found) / sum(seconds for _, seconds in found) > 0.5 * speed


def test_long_batches_come_back_when_nobody_decodes_any_more() -> None:
    pacing = PrefillPacing()
    for _ in range(8):
        pacing.note_batch(200, 0.2, decodes=True, prefills=True, now=1.0)
    assert pacing.rows(1.5, 0.02) < 150
    assert pacing.rows(5.0, 0.02) == 400

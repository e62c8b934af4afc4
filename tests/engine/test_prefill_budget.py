"""How many rows of prefill go into a batch, on machines of every speed."""

from __future__ import annotations

import random

import pytest

from swarmcore.engine.scheduler import FIRST, LEAST, LONGEST, SHORTEST, PrefillBudget

SPEEDS = [1.0, 10.0, 1e2, 1e3, 1e4, 1e5]
MOST = 512


def batches(
    speed: float, *, rows: int = 8192, fixed: float = 0.0, decode_seconds: float = 0.0, stalls: float = 0.0
) -> list[tuple[int, float]]:
    """Rows and seconds of the batches of a long prompt, each of which takes ``fixed`` seconds besides.

    With ``decode_seconds`` others decode meanwhile; with ``stalls`` so many of the batches take ten times as
    long, as on a machine that has other things to do.
    """
    pacing, now, found, rng = PrefillBudget(), 0.0, [], random.Random(1)
    while rows:
        taken = min(pacing.rows, rows, MOST)
        seconds = (fixed + taken / speed) * (10 if rng.random() < stalls else 1)
        now += seconds
        decodes = decode_seconds > 0
        pacing.note_batch(taken, seconds, decodes=decodes, decode_seconds=decode_seconds, now=now)
        found.append((taken, seconds))
        rows -= taken
    return found


def speed_of(found: list[tuple[int, float]]) -> float:
    return sum(taken for taken, _ in found) / sum(seconds for _, seconds in found)


@pytest.mark.parametrize("speed", SPEEDS)
def test_no_batch_takes_long_but_the_first_ones_of_a_slow_machine(speed: float) -> None:
    found = batches(speed, rows=2048)
    assert found[0][0] == FIRST
    assert all(seconds <= 16 for _, seconds in found)
    assert all(seconds <= LONGEST for _, seconds in found[5:])


@pytest.mark.parametrize("speed", [1e4, 1e5])
def test_a_fast_machine_soon_has_whole_batches(speed: float) -> None:
    assert [taken for taken, _ in batches(speed, fixed=0.01)[:6]] == [16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("speed", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("fixed", [0.0, 0.05])
def test_batches_are_short_while_others_decode(speed: float, fixed: float) -> None:
    found = batches(speed, fixed=fixed, decode_seconds=fixed or 0.001)
    allowed = max(SHORTEST, 4 * fixed, fixed + LEAST / speed)
    assert all(seconds <= 1.01 * allowed for _, seconds in found[6:])


@pytest.mark.parametrize("stalls", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("fixed", [0.02, 0.2])
def test_a_busy_machine_does_not_fall_back_to_single_rows(fixed: float, stalls: float) -> None:
    """Where each batch costs something, small ones would cost most of the speed there is."""
    alone = batches(1000.0, fixed=fixed, stalls=stalls)
    beside = batches(1000.0, fixed=fixed, decode_seconds=fixed, stalls=stalls)
    best = MOST / (fixed + MOST / 1000.0) / (1 + 9 * stalls)
    assert speed_of(alone) > 0.4 * best
    assert speed_of(beside) > 0.15 * best
    assert min(taken for taken, _ in beside[4:-1]) >= LEAST // 2


def test_long_batches_come_back_when_nobody_decodes_any_more() -> None:
    pacing = PrefillBudget(256)
    pacing.note_batch(256, 0.3, decodes=True, decode_seconds=0.01, now=1.0)
    assert pacing.rows == 128
    for now in (5.0, 6.0):
        pacing.note_batch(pacing.rows, 0.2, decodes=False, decode_seconds=0.01, now=now)
    assert pacing.rows == 512

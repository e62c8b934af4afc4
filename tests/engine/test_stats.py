"""What an engine says of its batches."""

from __future__ import annotations

import re

from swarmcore.engine.stats import RECENT, EngineStats


def test_batches_of_late_are_told_in_words_and_fade() -> None:
    stats = EngineStats()
    assert stats.recent(100.0) == ""
    for tick in range(2000):  # twenty a second, of three tokens, at work for 40 ms and waiting for 5
        now = 100.0 + 0.05 * tick
        stats.note_window(0.005, tick % 2 == 0, now)
        stats.note_batch(3, 0.04, True, now)
    told = stats.recent(200.0)
    found = re.fullmatch(
        r"(.*) batches/s of 3\.0 tokens: (.*) % of the time at work, (.*) % waiting for more steps", told
    )
    assert found is not None, told
    assert [round(float(value), -1) for value in found.groups()] == [20, 80, 10]
    assert stats.recent(200.0 + 10 * RECENT) == ""


def test_only_batches_of_decode_steps_count_as_such() -> None:
    stats = EngineStats()
    stats.note_batch(64, 0.2, False, 1.0)
    stats.note_batch(3, 0.1, True, 2.0)
    stats.note_window(0.05, False, 2.0)
    counters = stats.counters()
    assert (counters["batches"], counters["decode_batches"], counters["decode_tokens"]) == (2, 1, 3)
    assert counters["batch_waits"] == counters["batch_waits_in_vain"] == 1
    assert not any(name.startswith("_") for name in counters)

"""The codec of a step by link, from transits by two clocks that have nothing to do with one another."""

from __future__ import annotations

import math
import random

import pytest

from swarmcore.routing.link_codec import FORGET
from swarmcore.routing.step_codec import CAPACITY, FRESH, Link, StepCodecs, TransitRate
from swarmcore.types import PeerId

A, B = PeerId("a"), PeerId("b")
AB: Link = (A, B)
WIDTH = 4096


def arrive(
    codecs: StepCodecs, nbytes: int, rate: float, now: float, offset: float = -1e6, wait: float = 0.0
) -> None:
    codecs.arrived(AB, nbytes, offset + 0.025 + nbytes / rate + wait, now)


@pytest.mark.parametrize("offset", [-1e6, 0.0, 3e5])
@pytest.mark.parametrize("megabits", [1, 10, 100, 1000, 10_000])
def test_a_rate_shows_in_the_difference_of_two_sizes(megabits: float, offset: float) -> None:
    rate, codecs = megabits * 1e6 / 8, StepCodecs()
    arrive(codecs, 2 * WIDTH, rate, 0.0, offset)
    assert codecs.seconds_per_byte(AB, 0.0) == 0, "of one size it cannot be known"
    arrive(codecs, 512 * WIDTH, rate, 1.0, offset)
    assert codecs.seconds_per_byte(AB, 1.0) == pytest.approx(1 / rate, rel=1e-3)
    assert codecs.seconds_per_byte((B, A), 1.0) == 0


def test_what_waited_behind_other_messages_does_not_count() -> None:
    rng, codecs, rate = random.Random(3), StepCodecs(), 1e6
    for number in range(200):
        large = number % 10 == 0
        nbytes = (rng.randrange(200, 256) if large else rng.randrange(1, 5)) * WIDTH
        arrive(codecs, nbytes, rate, number * 0.1, wait=rng.choice((0.0, rng.random())))
    assert codecs.seconds_per_byte(AB, 20.0) == pytest.approx(1 / rate, rel=0.1)


def test_clocks_that_drift_do_not_become_a_rate() -> None:
    """A prompt, and minutes of single tokens after it: the clocks are milliseconds apart by then."""
    rate, codecs = 12.5e6, StepCodecs()
    arrive(codecs, 2 * WIDTH, rate, 0.0)
    arrive(codecs, 512 * WIDTH, rate, 0.0)
    for second in range(1, 400):
        arrive(codecs, 2 * WIDTH, rate, float(second), offset=-1e6 + second * 5e-5)
    assert codecs.seconds_per_byte(AB, 400.0) == pytest.approx(1 / rate, rel=0.02)
    arrive(codecs, 512 * WIDTH, rate, 400.0, offset=-1e6 + 400 * 5e-5)
    assert codecs.seconds_per_byte(AB, 400.0) == pytest.approx(1 / rate, rel=0.02)


def test_a_link_that_became_slower_is_seen() -> None:
    rate = TransitRate()
    for now, each in ((0.0, 1e7), (2 * FRESH, 1e6)):
        for nbytes in (8192, 1 << 20):
            rate.arrived(nbytes, nbytes / each, now)
        assert rate.seconds_per_byte == pytest.approx(1 / each)


@pytest.mark.parametrize(
    ("megabits", "rows", "codec"),
    [
        (100, 1, "raw"),  # it would save a third of a millisecond
        (100, 8, "int8"),
        (100, 256, "int8"),
        (10, 1, "int8"),
        (1000, 256, "raw"),  # coding takes as long as it saves
        (10_000, 256, "raw"),
        (None, 256, "raw"),  # nothing is known
    ],
)
def test_int8_goes_over_links_where_that_makes_a_step_shorter(
    megabits: float | None, rows: int, codec: str
) -> None:
    codecs = StepCodecs()
    if megabits is not None:
        for nbytes in (2 * WIDTH, 512 * WIDTH):
            arrive(codecs, nbytes, megabits * 1e6 / 8, 0.0)
    assert codecs.codec(AB, "bfloat16", (rows, WIDTH), 0.0) == codec
    assert codecs.codec(AB, "bfloat16", (rows, WIDTH), FORGET + 1) == "raw"


def test_a_peer_that_does_not_know_it_is_not_asked_again() -> None:
    codecs = StepCodecs()
    for nbytes in (2 * WIDTH, 512 * WIDTH):
        arrive(codecs, nbytes, 1e5, 0.0)
    assert codecs.codec(AB, "bfloat16", (8, WIDTH), 0.0) == "int8"
    codecs.refuse_int8(B)
    assert codecs.codec(AB, "bfloat16", (8, WIDTH), 0.0) == "raw"
    assert codecs.takes_int8(A)


@pytest.mark.parametrize("transit", [math.nan, math.inf, -math.inf])
def test_what_cannot_be_is_passed_over(transit: float) -> None:
    codecs = StepCodecs()
    codecs.arrived(AB, 8192, transit, 0.0)
    codecs.arrived(AB, 0, 1.0, 0.0)
    codecs.arrived(AB, -(2**80), 1.0, 0.0)
    assert len(codecs) == 0


def test_lies_are_held_in_bounds() -> None:
    """A stranger's sizes and times: whatever they are, the answer is a codec, and memory is bounded."""
    rng, codecs = random.Random(1), StepCodecs()
    for number in range(3 * CAPACITY):
        link = (PeerId(str(number % (2 * CAPACITY))), None)
        codecs.arrived(link, rng.choice((1, 2**70, 5000)), rng.choice((-1e308, 0.0, 1e308)), float(number))
        assert codecs.codec(link, "float32", (256, WIDTH), float(number)) in ("raw", "int8")
    for number in range(2 * CAPACITY):
        codecs.refuse_int8(PeerId(str(number)))
    assert len(codecs) == CAPACITY

"""Jitter, backoff and token buckets."""

from __future__ import annotations

from random import Random

from swarmcore.pacing import Backoff, TokenBucket, TokenBuckets, jittered


def test_jitter_stays_within_its_spread() -> None:
    rng = Random(0)
    drawn = [jittered(8.0, rng) for _ in range(200)]
    assert min(drawn) < 6.5 < 9.5 < max(drawn)
    assert all(6.0 <= each <= 10.0 for each in drawn)


def test_backoff_doubles_up_to_its_longest_pause() -> None:
    backoff = Backoff(1.0, 10.0)
    assert [backoff.next() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    backoff.reset()
    assert backoff.next() == 1.0


def test_backoff_takes_any_number_of_failures() -> None:
    backoff = Backoff(1.0, 10.0)
    assert {backoff.next() for _ in range(2000)} == {1.0, 2.0, 4.0, 8.0, 10.0}


def test_backoff_is_jittered_with_randomness_that_is_passed_in() -> None:
    backoff = Backoff(4.0, 100.0)
    assert backoff.next(Random(1)) == jittered(4.0, Random(1))
    assert backoff.next() == 8.0


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(100.4)
    assert bucket.take(100.5)
    assert not bucket.take(100.5)


def test_a_bucket_holds_no_more_than_its_burst() -> None:
    bucket = TokenBucket(rate=2.0, burst=1.0)
    assert bucket.take(0.0)
    assert [bucket.take(1000.0) for _ in range(2)] == [True, False]


def test_each_key_has_a_bucket_of_its_own_until_it_is_forgotten() -> None:
    buckets = TokenBuckets[str](rate=0.0, burst=1.0, most=2)
    assert buckets.take("a", 0.0)
    assert not buckets.take("a", 0.0)
    assert buckets.take("b", 0.0)
    assert not buckets.take("a", 0.0)  # used last
    assert buckets.take("c", 0.0)  # in place of "b"
    assert not buckets.take("a", 0.0)
    assert buckets.take("b", 0.0)

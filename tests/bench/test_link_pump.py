import random

import pytest

from swarmcore.bench.link_pump import LONGEST_QUEUE, MOST_PACKETS, DelayLine

ENDLESS = float("inf")


def line(*, delay: float = 0.025, loss: float = 0.0, rate: float = ENDLESS, seed: int = 0) -> DelayLine:
    return DelayLine(delay, loss, rate, random.Random(seed))


def all_due(line: DelayLine, now: float) -> list[tuple[float, bytes]]:
    return list(iter(lambda: line.take(now), None))


def test_a_packet_arrives_after_the_delay_and_not_before():
    one = line()
    assert one.next_at == ENDLESS
    one.put(b"a", 1.0)
    one.put(b"b", 1.01)
    assert one.next_at == 1.025
    assert one.take(1.02) is None
    assert all_due(one, 1.03) == [(1.025, b"a")]
    assert all_due(one, 2.0) == [(1.035, b"b")]
    assert one.next_at == ENDLESS


def test_a_rate_spaces_packets_out_by_their_length_and_idle_time_is_not_saved_up():
    one = line(rate=1000)
    for now in (0.0, 0.0, 5.0, 5.0):
        one.put(bytes(10), now)
    assert [at for at, _ in all_due(one, 10)] == pytest.approx([0.035, 0.045, 5.035, 5.045])


def test_what_would_wait_too_long_for_its_turn_is_dropped_until_the_queue_has_drained():
    one = line(rate=1000)
    for _ in range(20):
        one.put(bytes(10), 0.0)
    assert one.dropped == 20 - 11  # the first waits for nothing, the eleventh for `LONGEST_QUEUE`
    one.put(bytes(10), LONGEST_QUEUE)
    assert one.dropped == 20 - 11
    assert len(all_due(one, 10)) == 12


def test_no_more_is_held_than_a_bound_whatever_the_delay():
    one = line(delay=60)
    for _ in range(MOST_PACKETS + 5):
        one.put(b"", 0.0)
    assert one.dropped == 5
    assert len(all_due(one, 61)) == MOST_PACKETS


def test_losses_are_those_of_the_seed_and_as_many_as_was_said():
    def survivors(seed: int) -> list[bytes]:
        one = line(loss=0.05, seed=seed)
        for number in range(10_000):
            one.put(number.to_bytes(2, "big"), 0.0)
        assert one.taken == 10_000
        arrived = [packet for _, packet in all_due(one, 1.0)]
        assert len(arrived) == 10_000 - one.lost
        assert 400 < one.lost < 600
        return arrived

    assert survivors(1) == survivors(1) != survivors(2)
    assert survivors(1) == sorted(survivors(1))

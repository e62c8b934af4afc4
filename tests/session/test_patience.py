"""When a step is waited for, sent again or given up, and when what failed is tried again, at every speed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from swarmcore.errors import (
    CacheFullError,
    ConnectionLostError,
    DeadlineExceededError,
    MissingBlocksError,
    ServerMemoryError,
)
from swarmcore.session.patience import MAX_FAILURES, RetryPolicy, StepPatience

SPEEDS = [10.0**power for power in range(6)] + [0.5, 2.0, 7.0]
TIMEOUT = 60.0


def outcome(
    *, speed: float, rows: int, alone: bool, hangs_after: float = math.inf, behind: float = 0.0
) -> tuple[str, float]:
    """What becomes of a step of ``rows`` on a server that is asked every second, and when.

    It computes ``speed`` rows a second in batches of a second at most, after others' rows that take
    ``behind`` seconds, until it hangs.
    """
    patience, seen, work = StepPatience(0.0, TIMEOUT), 0, 0
    for now in map(float, range(1, 100_000)):
        busy = min(now, hangs_after)
        if busy - behind >= rows / speed:
            return "done", now
        done = int(max(busy - behind, 0.0) * speed)
        if done > seen:
            seen = done
            patience.progressed(now)
        elif int(busy) > work:
            work = int(busy)
            patience.others_progressed(now)
        verdict = patience.judge(now, held=True, alone=alone)
        assert verdict != "resend", "the server has it"
        if verdict != "wait":
            return verdict, now
    raise AssertionError("never decided")


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("speed", SPEEDS)
def test_whoever_gets_on_is_waited_for(speed: float, alone: bool) -> None:
    assert outcome(speed=speed, rows=2000, alone=alone)[0] == "done"


@pytest.mark.parametrize("speed", SPEEDS)
def test_whoever_hangs_is_replaced_within_the_timeout_at_any_speed(speed: float) -> None:
    verdict, at = outcome(speed=speed, rows=10**9, alone=False, hangs_after=5.0)
    assert verdict == "replace" and TIMEOUT <= at - 5.0 <= TIMEOUT + 2.0


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_lone_server_that_hangs_is_never_replaced_and_not_waited_for_for_ever(speed: float) -> None:
    verdict, at = outcome(speed=speed, rows=10**9, alone=True, hangs_after=5.0)
    assert verdict == "give up" and 9 * TIMEOUT < at < 11 * TIMEOUT


@pytest.mark.parametrize(("alone", "verdict"), [(True, "done"), (False, "replace")])
def test_a_turn_behind_others_is_waited_for_and_longer_where_nobody_else_is(
    alone: bool, verdict: str
) -> None:
    assert outcome(speed=100.0, rows=100, alone=alone, behind=200.0)[0] == "done"
    assert outcome(speed=100.0, rows=100, alone=alone, behind=600.0)[0] == verdict


def test_a_step_that_its_server_does_not_have_is_sent_again_thrice_and_then_the_server_is_replaced() -> None:
    patience = StepPatience(0.0, TIMEOUT)
    verdicts = [(now, patience.judge(float(now), held=False, alone=False)) for now in range(100)]
    assert [now for now, verdict in verdicts if verdict == "resend"] == [15, 30, 45]
    assert next(now for now, verdict in verdicts if verdict == "replace") == 60
    patience.progressed(100.0)
    assert patience.judge(101.0, held=False, alone=False) == "wait"
    assert patience.judge(115.0, held=False, alone=False) == "resend"


def attempts(policy: RetryPolicy, error: Exception) -> list[float]:
    """When it is tried again, each attempt failing at once."""
    now, tried = 0.0, []
    while (pause := policy.failed(now, error)) < math.inf:  # type: ignore[arg-type]
        now += pause
        tried.append(now)
    return tried


def test_who_has_no_memory_is_asked_a_few_times_within_patience() -> None:
    assert attempts(RetryPolicy(60.0), ServerMemoryError("no")) == [1, 3, 7, 15, 31, 51]
    assert attempts(RetryPolicy(0.5), CacheFullError("no")) == []


def test_who_is_missing_is_looked_for_often_and_does_not_count_as_a_failure() -> None:
    policy = RetryPolicy(60.0)
    tried = attempts(policy, MissingBlocksError("no"))
    assert 30 <= len(tried) <= 40 and 57 < tried[-1] <= 60
    assert policy.failures == 0
    assert tried[0] == 0.1
    assert max(later - earlier for earlier, later in pairwise(tried)) == pytest.approx(2.0)


def test_failures_in_one_step_have_an_end_whoever_takes_over() -> None:
    policy = RetryPolicy(1e9)
    for _ in range(MAX_FAILURES // 2):
        assert policy.failed(0.0, ConnectionLostError("gone")) < math.inf
        policy.replaced()
    assert policy.failed(0.0, ConnectionLostError("gone")) == math.inf
    policy.succeeded()
    assert policy.failed(0.0, ConnectionLostError("gone")) < math.inf


def test_a_lack_of_memory_is_not_forgotten_when_another_takes_over() -> None:
    policy = RetryPolicy(60.0)
    assert policy.failed(0.0, ServerMemoryError("no")) == 1.0
    policy.replaced()
    assert policy.failed(10.0, ServerMemoryError("no")) == 2.0
    policy.replaced()
    assert policy.failed(70.0, ServerMemoryError("no")) == math.inf


def test_a_deadline_is_no_lack_of_room() -> None:
    assert RetryPolicy(60.0).failed(0.0, DeadlineExceededError("late")) == 0.1

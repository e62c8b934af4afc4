"""The KV cache manager: what is granted, in which order, and who has to go."""

import math

import pytest

from swarmcore.engine.kv_allocation import Admitted, Evicted, Grown, KVAllocation, Refused
from swarmcore.engine.kv_cache_manager import SHARE_GRACE, KVCacheManager
from swarmcore.errors import CacheFullError


def admit(
    manager: KVCacheManager, name: str, sequences: int = 1, tokens: int = 0, now: float = 0.0
) -> KVAllocation:
    manager.request(name, sequences, tokens, now + 10, now)
    [outcome] = manager.poll(now)
    assert isinstance(outcome, Admitted)
    return outcome.allocation


def busy(manager: KVCacheManager, name: str, tokens: int) -> KVAllocation:
    """A session that holds ``tokens`` and has a step to run."""
    allocation = admit(manager, name)
    allocation.idle_since = None
    assert manager.grow(allocation, [tokens], math.inf, 0.0)
    return allocation


def test_sessions_take_whole_pages_as_they_grow() -> None:
    manager = KVCacheManager(tokens=100, page=16)
    allocation = admit(manager, "a", sequences=2)
    assert manager.pages == 6 and manager.held == 0
    assert manager.grow(allocation, [1, 17], 1.0, 0.0)
    assert manager.held == 3
    assert manager.grow(allocation, [16, 32], 1.0, 0.0)
    assert manager.held == 3


def test_rollback_returns_pages_once_it_is_settled() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    allocation = busy(manager, "a", 60)
    # While the step computes, the old pages are still in use.
    assert manager.grow(allocation, [20], 1.0, 0.0)
    assert manager.held == 4
    manager.settle(allocation, [20], 0.0)
    assert manager.held == 2


def test_what_was_asked_for_at_admission_is_set_aside_until_it_is_used() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    first = admit(manager, "a", tokens=48)
    assert manager.free == 1
    assert manager.grow(first, [16], 1.0, 0.0) and manager.free == 1
    assert manager.grow(first, [48], 1.0, 0.0) and manager.free == 1
    manager.settle(first, [10], 0.0)
    assert manager.free == 3


def test_a_new_session_waits_for_room_in_order() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    first = admit(manager, "a", tokens=64)
    big = manager.request("big", 1, 64, 10.0, 0.0)
    small = manager.request("small", 1, 16, 10.0, 0.0)
    assert manager.poll(1.0) == []
    manager.release(first, 2.0)
    assert [outcome.request for outcome in manager.poll(2.0) if isinstance(outcome, Admitted)] == [big]
    manager.withdraw(small)
    assert not manager.admissions


def test_the_wait_for_admission_ends_at_its_deadline_and_says_when_to_come_back() -> None:
    manager = KVCacheManager(tokens=64, page=16, idle_timeout=100.0)
    admit(manager, "a", tokens=64, now=0.0)
    request = manager.request("b", 1, 16, 10.0, 0.0)
    assert manager.next_wakeup(0.0) == 10.0
    assert manager.expire(9.0) == []
    [outcome] = manager.expire(10.0)
    assert isinstance(outcome, Refused) and outcome.waiter is request
    # Nothing came free lately: what is set aside for the idle one and not used is what there is to wait for.
    assert outcome.error.retry_after == pytest.approx(20.0)
    assert "0 of 64 tokens are free" in outcome.error.message


def test_retry_after_follows_the_rate_at_which_pages_come_free() -> None:
    manager = KVCacheManager(tokens=720, page=16, idle_timeout=600.0)
    allocations = [busy(manager, f"{n}", 16) for n in range(40)]
    for second, allocation in enumerate(allocations[:20]):
        manager.release(allocation, float(second))
    slow = manager.retry_after(pages=40, now=20.0)
    for allocation in allocations[20:25]:
        manager.release(allocation, 20.0)
    assert 0.5 <= manager.retry_after(pages=40, now=20.0) < slow < 600.0


def test_a_request_above_the_whole_budget_is_refused_at_once() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    with pytest.raises(CacheFullError, match=r"80 tokens.* has 64 in all") as caught:
        manager.request("a", 1, 65, 10.0, 0.0)
    assert caught.value.retry_after == math.inf
    allocation = admit(manager, "b")
    with pytest.raises(CacheFullError, match="in all"):
        manager.grow(allocation, [65], 10.0, 0.0)


def test_the_line_of_new_sessions_is_bounded() -> None:
    manager = KVCacheManager(tokens=64, page=16, max_waiting=2, max_sessions=1)
    admit(manager, "a")
    manager.request("b", 1, 0, 10.0, 0.0)
    manager.request("c", 1, 0, 10.0, 0.0)
    with pytest.raises(CacheFullError, match="2 sessions wait"):
        manager.request("d", 1, 0, 10.0, 0.0)
    assert manager.poll(0.0) == []


def test_admission_leaves_room_for_those_that_are_there_to_grow() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    busy(manager, "a", 100)
    # 60 pages are free; one for each sequence stays in reserve.
    assert manager.may_admit(1, 58) and not manager.may_admit(1, 59)
    assert manager.may_admit(50, 40) and not manager.may_admit(50, 41)


def test_growth_comes_before_admission_and_waits_in_order() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    first, second, third = busy(manager, "a", 32), busy(manager, "b", 16), busy(manager, "c", 16)
    assert not manager.grow(first, [48], 10.0, 0.0)
    assert not manager.grow(second, [32], 10.0, 0.0)
    manager.request("d", 1, 0, 10.0, 0.0)
    assert manager.poll(1.0) == []
    manager.release(third, 2.0)
    assert manager.poll(2.0) == [Grown(first)]
    assert manager.held == 4


def test_growth_ends_at_its_deadline() -> None:
    manager = KVCacheManager(tokens=32, page=16)
    first = busy(manager, "a", 16)
    busy(manager, "b", 16)
    assert not manager.grow(first, [17], 5.0, 0.0)
    [outcome] = manager.expire(5.0)
    assert isinstance(outcome, Refused) and outcome.error.retry_after > 0
    assert first.growth is None and manager.held == 2


def test_idle_sessions_end_after_their_time() -> None:
    manager = KVCacheManager(tokens=64, page=16, idle_timeout=100.0)
    idle, working = admit(manager, "idle", tokens=16), busy(manager, "working", 16)
    assert manager.next_wakeup(0.0) == 30.0, "when what was set aside for it is free again"
    assert manager.expire(99.0) == []
    [outcome] = manager.expire(100.0)
    assert isinstance(outcome, Evicted) and outcome.allocation is idle
    assert "idle for 100 seconds" in outcome.error.message
    assert manager.held == working.held == 1


def test_growth_takes_the_room_of_the_longest_idle_after_their_grace() -> None:
    manager = KVCacheManager(tokens=64, page=16, idle_timeout=600.0, idle_grace=30.0)
    growing, older, younger = busy(manager, "a", 32), busy(manager, "b", 16), busy(manager, "c", 16)
    older.idle_since, younger.idle_since = 1.0, 2.0
    assert not manager.grow(growing, [48], 100.0, 10.0)
    assert manager.poll(10.0) == [] and manager.next_wakeup(10.0) == 31.0
    outcomes = manager.poll(40.0)
    assert [type(outcome) for outcome in outcomes] == [Evicted, Grown]
    assert isinstance(outcomes[0], Evicted) and outcomes[0].allocation is older


def test_idle_sessions_stay_when_their_room_would_not_be_enough() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    growing, idle = busy(manager, "a", 16), busy(manager, "b", 16)
    busy(manager, "c", 32)
    idle.idle_since = 0.0
    assert not manager.grow(growing, [48], 1000.0, 10.0)
    assert manager.poll(100.0) == []
    # Its grace being over, what comes next for it is its ordinary end.
    assert manager.next_wakeup(100.0) == 600.0


def test_when_all_wait_for_each_other_the_youngest_goes() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    first, second, third = busy(manager, "a", 32), busy(manager, "b", 16), busy(manager, "c", 16)
    assert not manager.grow(second, [32], 100.0, 0.0)
    assert not manager.grow(third, [32], 100.0, 0.0)
    assert manager.poll(0.0) == []
    assert not manager.grow(first, [48], 100.0, 0.0)
    outcomes = manager.poll(0.0)
    assert [type(outcome) for outcome in outcomes] == [Evicted, Grown]
    assert [outcome.allocation for outcome in outcomes if isinstance(outcome, Evicted)] == [third]
    assert second.growth is None and first.growth is not None


def test_what_is_set_aside_and_not_used_is_free_again_after_the_grace() -> None:
    manager = KVCacheManager(tokens=64, page=16, idle_grace=30.0)
    idle, begun = admit(manager, "idle", tokens=32), admit(manager, "begun", tokens=16)
    assert manager.grow(begun, [5], 10.0, 0.0)
    assert manager.free == 1
    assert manager.expire(29.0) == []
    assert manager.expire(30.0) == []
    assert (idle.held, begun.held, manager.free) == (0, 1, 3)


# --- several callers -----------------------------------------------------------------------------------


def admit_for(manager: KVCacheManager, caller: str, tokens: int = 0, now: float = 0.0) -> KVAllocation:
    request = manager.request(f"{caller}{now}{tokens}", 1, tokens, now + 100, now, caller)
    return next(o.allocation for o in manager.poll(now) if isinstance(o, Admitted) and o.request is request)


def busy_for(manager: KVCacheManager, caller: str, tokens: int, now: float = 0.0) -> KVAllocation:
    allocation = admit_for(manager, caller, now=now)
    allocation.idle_since = None
    assert manager.grow(allocation, [tokens], math.inf, now)
    return allocation


def test_what_was_set_aside_for_one_is_given_back_at_once_when_another_waits() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    greedy = admit_for(manager, "greedy", tokens=160)
    modest = admit_for(manager, "modest", tokens=40, now=1.0)
    assert (greedy.held, modest.held) == (118, 40), "with a page for each to grow"
    assert admit_for(manager, "modest", tokens=30, now=2.0).held == 30
    assert greedy.held == 160 - 70 - 3
    wanted = manager.request("more", 1, 30, 100.0, 3.0, "modest")
    assert manager.poll(3.0) == [], "that would be more than its share"
    assert wanted in manager.admissions


def test_a_caller_that_uses_more_than_its_share_loses_a_session_to_one_that_waits() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    older, younger = busy_for(manager, "greedy", 70, 0.0), busy_for(manager, "greedy", 88, 1.0)
    wanted = manager.request("wanted", 1, 40, 100.0, 10.0, "modest")
    assert manager.poll(10.0) == []
    assert manager.next_wakeup(10.0) == 10.0 + SHARE_GRACE
    [evicted] = manager.poll(10.0 + SHARE_GRACE)
    assert isinstance(evicted, Evicted) and evicted.allocation is younger
    assert "more than its share" in evicted.error.message
    # It may compute: whoever carries that out says when it does not.
    assert younger.leaving and manager.held == 158
    assert manager.poll(16.0) == [], "nobody else goes for the same room"
    manager.release(younger, 17.0)
    [admitted] = manager.poll(17.0)
    assert isinstance(admitted, Admitted) and admitted.request is wanted
    assert not older.leaving


def test_of_those_above_their_share_the_idle_go_first() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    idle, working = busy_for(manager, "greedy", 70, 0.0), busy_for(manager, "greedy", 80, 1.0)
    idle.idle_since = 2.0
    growing = busy_for(manager, "modest", 5, 3.0)
    assert not manager.grow(growing, [40], 100.0, 4.0)
    assert manager.poll(8.0) == []
    evicted, grown = manager.poll(9.0) + manager.poll(9.0)
    assert isinstance(evicted, Evicted) and evicted.allocation is idle and not idle.leaving
    assert grown == Grown(growing)
    assert not working.leaving


def test_nobody_loses_a_session_to_one_that_wants_more_than_its_share() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    allocation = busy_for(manager, "one", 75)
    other = busy_for(manager, "other", 75)
    other.idle_since = 1.0
    assert not manager.grow(allocation, [100], 1000.0, 2.0)
    assert manager.poll(20.0) == []
    # As for everyone: those that have been idle for long make room for those that grow.
    assert [type(outcome) for outcome in manager.poll(32.0)] == [Evicted, Grown]


def test_a_growth_above_its_share_keeps_no_newcomer_out() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    greedy, other = busy_for(manager, "greedy", 100), busy_for(manager, "other", 20)
    assert not manager.grow(greedy, [150], 3600.0, 1.0)
    assert other.held == 20
    assert admit_for(manager, "modest", tokens=20, now=2.0).held == 20


def test_the_caller_that_holds_least_is_let_in_next() -> None:
    manager = KVCacheManager(tokens=160, page=1)
    first = busy_for(manager, "a", 60)
    second = busy_for(manager, "b", 90)
    waiting = [manager.request(f"{n}", 1, 20, 100.0, 1.0 + n, caller) for n, caller in enumerate("bbac")]
    assert manager.poll(5.0) == []
    manager.release(second, 5.0)
    admitted = [outcome.request for outcome in manager.poll(5.0) if isinstance(outcome, Admitted)]
    assert admitted[0] is waiting[0] or admitted[0] is waiting[3], "b and c hold nothing"
    assert waiting[3] in admitted[:2]
    assert first.held == 60


def test_one_caller_has_not_all_sessions_that_there_may_be() -> None:
    manager = KVCacheManager(tokens=160, page=1, max_sessions=4)
    crowd = [admit_for(manager, "crowd", tokens=1, now=float(n)) for n in range(4)]
    crowd[0].idle_since = None
    wanted = manager.request("wanted", 1, 0, 100.0, 10.0, "other")
    assert manager.poll(14.0) == []
    [evicted] = manager.poll(15.0)
    assert isinstance(evicted, Evicted) and evicted.allocation is crowd[1]
    [admitted] = manager.poll(15.0)
    assert isinstance(admitted, Admitted) and admitted.request is wanted


def test_repr_shows_the_state() -> None:
    manager = KVCacheManager(tokens=64, page=16)
    busy(manager, "a", 20)
    assert repr(manager) == "<KVCacheManager 32/64 tokens · 1 sessions · 0 growing · 0 waiting>"

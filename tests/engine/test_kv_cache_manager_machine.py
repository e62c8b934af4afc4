"""Whatever happens in whatever order: never over budget, nothing lost, nobody forgotten in the queue."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from swarmcore.engine.kv_allocation import (
    AdmissionRequest,
    Admitted,
    Evicted,
    Grown,
    GrowthRequest,
    KVAllocation,
    Outcome,
    Refused,
)
from swarmcore.engine.kv_cache_manager import SHARE_GRACE, KVCacheManager
from swarmcore.errors import CacheFullError

PAGE, PAGES, MAX_SESSIONS = 4, 24, 6
IDLE_TIMEOUT, IDLE_GRACE = 60.0, 10.0


class ManagerMachine(RuleBasedStateMachine):
    """Plays the engine: keeps its own books and compares."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.manager = KVCacheManager(
            PAGE * PAGES + 3,
            PAGE,
            idle_timeout=IDLE_TIMEOUT,
            idle_grace=IDLE_GRACE,
            max_sessions=MAX_SESSIONS,
            max_waiting=4,
        )
        self.names = 0
        self.open: dict[KVAllocation, list[int]] = {}
        self.waiting: list[AdmissionRequest] = []
        self.growing: dict[KVAllocation, tuple[list[int], float]] = {}

    # --- what the engine does with outcomes ---

    def carry_out(self, outcomes: list[Outcome]) -> list[KVAllocation]:
        admitted = []
        for outcome in outcomes:
            match outcome:
                case Admitted(request, allocation):
                    assert request is self.waiting.pop(0), "admitted out of order"
                    self.open[allocation] = [0] * request.sequences
                    admitted.append(allocation)
                case Grown(allocation):
                    assert allocation is next(iter(self.growing)), "grown out of order"
                    lengths, _ = self.growing.pop(allocation)
                    self.open[allocation] = lengths
                case Refused(AdmissionRequest() as request, error):
                    assert request.deadline <= self.now and error.retry_after > 0
                    self.waiting.remove(request)
                case Refused(GrowthRequest(allocation=allocation), error):
                    assert self.growing.pop(allocation)[1] <= self.now and error.retry_after > 0
                case Evicted(allocation):
                    idle = (
                        allocation.idle_since is not None and self.now - allocation.idle_since >= IDLE_GRACE
                    )
                    assert idle or allocation in self.growing, "a working session was evicted"
                    self.growing.pop(allocation, None)
                    del self.open[allocation]
        return admitted

    def settle_down(self) -> list[KVAllocation]:
        admitted = []
        while outcomes := self.manager.poll(self.now):
            admitted += self.carry_out(outcomes)
        return admitted

    # --- events ---

    @rule(
        target=sessions,
        sequences=st.integers(1, 3),
        tokens=st.integers(0, PAGE * PAGES),
        patience=st.integers(0, 30),
    )
    def request(self, sequences: int, tokens: int, patience: int):  # type: ignore[no-untyped-def]
        self.names += 1
        try:
            request = self.manager.request(f"s{self.names}", sequences, tokens, self.now + patience, self.now)
        except CacheFullError as error:
            assert len(self.waiting) == 4 or error.retry_after == math.inf
            return multiple()
        self.waiting.append(request)
        return multiple(*self.settle_down())

    @rule(target=sessions, session=sessions, growth=st.lists(st.integers(-8, 12), min_size=3, max_size=3))
    def step(self, session: KVAllocation, growth: list[int]):  # type: ignore[no-untyped-def]
        if session not in self.open or session in self.growing:
            return multiple()
        lengths = [max(0, n + more) for n, more in zip(self.open[session], growth, strict=False)]
        session.idle_since = None
        try:
            granted = self.manager.grow(session, lengths, self.now + 15, self.now)
        except CacheFullError as error:
            assert error.retry_after == math.inf
            return multiple()
        if granted:
            self.open[session] = lengths
        else:
            self.growing[session] = lengths, self.now + 15
        return multiple(*self.settle_down())

    @rule(target=sessions, session=sessions)
    def finish(self, session: KVAllocation):  # type: ignore[no-untyped-def]
        if session not in self.open or session in self.growing:
            return multiple()
        self.manager.settle(session, self.open[session], self.now)
        if session.idle_since is None:
            session.idle_since = self.now
        return multiple(*self.settle_down())

    @rule(target=sessions, session=consumes(sessions))
    def close(self, session: KVAllocation):  # type: ignore[no-untyped-def]
        self.manager.release(session, self.now)
        self.growing.pop(session, None)
        self.open.pop(session, None)
        return multiple(*self.settle_down())

    @rule(target=sessions)
    def cancel_a_wait(self):  # type: ignore[no-untyped-def]
        if self.waiting:
            self.manager.withdraw(self.waiting.pop())
        elif self.growing:
            allocation, _ = self.growing.popitem()
            self.manager.stop_waiting(allocation)
        return multiple(*self.settle_down())

    @rule(target=sessions, seconds=st.sampled_from([0.5, 5.0, 12.0, 70.0]))
    def time_passes(self, seconds: float):  # type: ignore[no-untyped-def]
        """The driver wakes at every time it was told of, and at the end of the wait."""
        end, admitted = self.now + seconds, []
        while (when := self.manager.next_wakeup(self.now)) is not None and when <= end:
            self.now = max(when, self.now)
            self.carry_out(self.manager.expire(self.now))
            admitted += self.settle_down()
            again = self.manager.next_wakeup(self.now)
            assert again is None or again > self.now, "it would wake for nothing, for ever"
        self.now = end
        assert self.manager.expire(end) == []
        return multiple(*admitted)

    # --- what always holds ---

    @invariant()
    def never_over_budget(self) -> None:
        assert 0 <= self.manager.held <= PAGES

    @invariant()
    def conservation(self) -> None:
        allocations = self.manager.allocations.values()
        assert set(allocations) == set(self.open)
        assert self.manager.held == sum(allocation.held for allocation in allocations)
        for allocation, lengths in self.open.items():
            assert all(n <= pages * PAGE for n, pages in zip(lengths, allocation.pages, strict=True))

    @invariant()
    def nobody_is_lost_or_waits_in_vain(self) -> None:
        assert list(self.manager.admissions) == self.waiting
        assert [growth.allocation for growth in self.manager.growths] == list(self.growing)
        if self.growing:
            assert self.manager.growths[0].wanted > self.manager.free
            # Someone else can still make room: by finishing, by closing, or by staying idle too long.
            assert any(h not in self.growing for h in self.open if h.held), "all wait on each other"
        elif self.waiting:
            head = self.waiting[0]
            assert not self.manager.may_admit(head.sequences, head.wanted)
            assert self.open, "an empty server lets nobody in"


ManagerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestManagerMachine = ManagerMachine.TestCase


CALLERS = ("ann", "bob", "eve")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "grow", "idle", "close", "wait"]),
            st.sampled_from(CALLERS),
            st.integers(0, PAGE * PAGES),
        ),
        max_size=60,
    )
)
@settings(max_examples=150, deadline=None)
def test_nobody_waits_long_for_a_share_whatever_the_others_do(events: list[tuple[str, str, int]]) -> None:
    manager = KVCacheManager(PAGE * PAGES, PAGE, idle_timeout=1e6, idle_grace=1e5)
    now = 0.0
    lengths: dict[KVAllocation, int] = {}

    def settle_down() -> None:
        while outcomes := manager.poll(now):
            for outcome in outcomes:
                match outcome:
                    case Admitted(_, allocation):
                        lengths[allocation] = 0
                    case Grown(allocation):
                        lengths[allocation] = sum(allocation.pages) * PAGE
                    case Evicted(allocation):
                        manager.release(allocation, now)
                        del lengths[allocation]
        held = {caller: sum(h.held for h in lengths if h.caller == caller) for caller in CALLERS}
        assert manager.held == sum(held.values()) <= manager.pages
        assert all(manager._shares.held(caller) == pages for caller, pages in held.items())

    for number, (what, caller, tokens) in enumerate(events):
        own = [allocation for allocation in lengths if allocation.caller == caller]
        if what == "open":
            manager.request(f"{number}", 1, tokens, now + 1e6, now, caller)
        elif what == "wait":
            now += tokens / 16
        elif own and own[-1].growth is None:
            allocation = own[-1]
            if what == "grow":
                allocation.idle_since = None
                if manager.grow(allocation, [tokens], now + 1e6, now):
                    lengths[allocation] = tokens
            elif what == "idle":
                manager.settle(allocation, [lengths[allocation]], now)
                allocation.idle_since = now
            else:
                manager.release(allocation, now)
                del lengths[allocation]
        settle_down()
    # From here on nobody does anything of its own accord.
    for _ in range(len(events) + 1):
        now += SHARE_GRACE
        settle_down()
    waiter = manager._entitled()
    assert waiter is None or all(not manager._shares.surplus(h.caller) for h in lengths)

"""Who holds how many pages of the attention cache, who waits for more, who has to go.

A plain object. It moves no memory and has no clock: its methods are called with what happens and ``now``, and
return outcomes for the caller to apply (`swarmcore.engine.session_manager`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from swarmcore.engine.kv_allocation import (
    AdmissionRequest,
    Admitted,
    Evicted,
    FairShares,
    Grown,
    GrowthRequest,
    KVAllocation,
    Outcome,
    PageSize,
    Refused,
    ReleaseRate,
    WaitingRequest,
)
from swarmcore.errors import CacheFullError, SessionLostError

SHARE_GRACE = 5.0
"""Seconds for which a caller waits for room within its share before one that holds more loses a session."""

MIN_RETRY = 0.5
"""Least `retry_after`, in seconds: a client that is told to wait should not be back at once."""


class KVCacheManager:
    """``tokens`` of cache in ``blocks`` blocks, in pages of ``page`` tokens; none beyond these is held.

    Sessions grow as they go. One that grows comes before one that is new; each kind has a queue of its own.
    A new session is admitted only when some room is left for those that are there (one page for each
    sequence, an eighth of the budget at most), so that growth seldom has to wait at all. When it has to:

    - sessions idle for ``idle_grace`` seconds are evicted for it, the longest idle first;
    - when every session with pages waits for more, none could ever go on: the youngest is evicted.

    Without anyone waiting, a session is evicted after ``idle_timeout`` idle seconds, and what was set aside
    for it is free again when it has not begun to use it within ``idle_grace``.

    While callers contend (`FairShares`) each has a right to an equal share. Whoever waits within its share
    comes first; those that hold more give back at once what was only set aside for them, and after
    `SHARE_GRACE` seconds sessions: idle ones first, then the youngest.
    """

    def __init__(
        self,
        tokens: int,
        page: int,
        *,
        blocks: int = 1,
        idle_timeout: float = 600.0,
        idle_grace: float = 30.0,
        max_sessions: int = 1024,
        max_waiting: int = 1024,
    ) -> None:
        self.page = page
        self.pages = tokens // page
        self.blocks = blocks
        """Blocks that a page reaches through, however many the executor comes to hold."""
        self.held = 0
        self.idle_timeout = idle_timeout
        self.idle_grace = min(idle_grace, idle_timeout)
        self.max_sessions = max_sessions
        self.max_waiting = max_waiting
        self.allocations: dict[int, KVAllocation] = {}
        self.admissions: deque[AdmissionRequest] = deque()
        self.growths: deque[GrowthRequest] = deque()
        self._shares = FairShares(self.pages)
        self._serial = 0
        self._sequences = 0
        self._release_rate = ReleaseRate()

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.pages - self.held

    def tokens(self, pages: int, blocks: int) -> int:
        """Tokens in ``blocks`` blocks that ``pages`` pages have room for."""
        return pages * self.page * self.blocks // blocks

    # --- admission -----------------------------------------------------------------------------------

    def may_admit(self, sequences: int, pages: int) -> bool:
        """Whether a new session could be let in now, were it the first in the queue."""
        if len(self.allocations) >= self.max_sessions or any(map(self._shares.comes_first, self.growths)):
            return False
        return pages + self._growth_reserve(sequences) <= self.free

    def request(
        self,
        session: str,
        sequences: int,
        tokens: int,
        deadline: float,
        now: float,
        caller: str = "",
        *,
        blocks: int | None = None,
        prefix_tokens: int = 0,
    ) -> AdmissionRequest:
        """Queue a new session of ``caller`` for ``tokens`` of cache; `poll` tells when it is admitted.

        It passes through ``blocks`` blocks, by default all; each of its sequences begins with
        ``prefix_tokens`` cached positions besides its tokens. Raise `CacheFullError` when it could never be
        admitted, or when the queue is as long as it may be.
        """
        page = PageSize(self.page, blocks or self.blocks, self.blocks, prefix_tokens)
        pages = sequences * page.pages(-(-tokens // sequences))
        if pages > self.pages:
            raise self._never_fits(pages)
        if len(self.admissions) >= self.max_waiting:
            raise self._full(f"{len(self.admissions)} sessions wait for attention cache already", pages, now)
        admission = AdmissionRequest(session, sequences, page, pages, deadline, caller, now)
        self.admissions.append(admission)
        return admission

    def withdraw(self, admission: AdmissionRequest) -> None:
        """Take a new session out of the queue."""
        if admission in self.admissions:
            self.admissions.remove(admission)

    def _growth_reserve(self, sequences: int) -> int:
        return min(self._sequences + sequences, self.pages // 8) if self.held else 0

    def _admit(self, admission: AdmissionRequest, now: float) -> Admitted:
        self._serial += 1
        allocation = KVAllocation(
            admission.session,
            self._serial,
            admission.page,
            [0] * admission.sequences,
            reserved=admission.wanted,
            idle_since=now,
            caller=admission.caller,
        )
        self.allocations[allocation.serial] = allocation
        self._count(allocation, allocation.held, now)
        self._sequences += admission.sequences
        return Admitted(admission, allocation)

    # --- growth, rollback, release -------------------------------------------------------------------

    def grow(self, allocation: KVAllocation, lengths: Sequence[int], deadline: float, now: float) -> bool:
        """Make room for sequences of ``lengths`` tokens; pages above that stay until `settle`.

        False when there is no room: the session then waits in the queue, and `poll` tells when it has grown.
        Raise `CacheFullError` when that could never be.
        """
        wanted = allocation.pages_for(lengths)
        pages = [max(old, new) for old, new in zip(allocation.pages, wanted, strict=True)]
        if pages == allocation.pages:
            return True
        if sum(pages) > self.pages:
            raise self._never_fits(sum(pages))
        growth = GrowthRequest(allocation, pages, deadline, now)
        if growth.wanted <= 0 or (not self.growths and growth.wanted <= self.free):
            self._set_pages(allocation, pages, now)
            return True
        allocation.growth = growth
        self.growths.append(growth)
        return False

    def stop_waiting(self, allocation: KVAllocation) -> None:
        """The session no longer wants to grow."""
        if allocation.growth is not None:
            self.growths.remove(allocation.growth)
            allocation.growth = None

    def settle(self, allocation: KVAllocation, lengths: Sequence[int], now: float) -> None:
        """The sequences are ``lengths`` tokens long now, and no step is in the queue: return the rest."""
        pages = allocation.pages_for(lengths)
        if pages != allocation.pages:
            self._set_pages(allocation, pages, now)

    def release(self, allocation: KVAllocation, now: float) -> None:
        """The session is gone; all its pages are free."""
        if self.allocations.pop(allocation.serial, None) is None:
            return
        self.stop_waiting(allocation)
        self._sequences -= len(allocation.pages)
        self._count(allocation, -allocation.held, now)

    def _set_pages(self, allocation: KVAllocation, pages: list[int], now: float) -> None:
        before = allocation.held
        allocation.pages, allocation.used = pages, sum(pages)
        if allocation.used >= allocation.reserved:
            allocation.reserved = 0
        self._count(allocation, allocation.held - before, now)

    def _count(self, allocation: KVAllocation, pages: int, now: float) -> None:
        """It holds so many more pages, or fewer."""
        self.held += pages
        self._shares.add(allocation.caller, pages)
        self._release_rate.note(-pages, now)

    def _return_unused(self, allocation: KVAllocation, pages: int, now: float) -> None:
        """So many of the pages that are only set aside for the session are free again."""
        before = allocation.held
        allocation.reserved = max(0, allocation.reserved - pages)
        self._count(allocation, allocation.held - before, now)

    # --- what can be granted -------------------------------------------------------------------------

    def poll(self, now: float) -> list[Outcome]:
        """What can be granted now: growth first, then new sessions; and who has to go for it."""
        outcomes: list[Outcome] = []
        if not self.growths and not self.admissions:
            return outcomes
        self._shares.update([g.caller for g in self.growths] + [a.caller for a in self.admissions])
        if (waiter := self._entitled()) is not None:
            self._reclaim_unused(waiter, now)
        while self.growths:
            growth = next(filter(self._shares.comes_first, self.growths), self.growths[0])
            if growth.wanted <= self.free:
                self.stop_waiting(growth.allocation)
                self._set_pages(growth.allocation, growth.pages, now)
                outcomes.append(Grown(growth.allocation))
            elif victim := self._victim(growth.wanted - self.free, now):
                outcomes.append(self._evict(victim, "the server needed its room for another session", now))
            else:
                break
        while self.admissions:
            admission = self._shares.next_admission(self.admissions)
            if not self.may_admit(admission.sequences, admission.wanted):
                break
            self.admissions.remove(admission)
            outcomes.append(self._admit(admission, now))
        if (waiter := self._entitled()) is not None and waiter.since + SHARE_GRACE <= now:
            outcomes += self._evict_above_share(waiter, now)
            outcomes += self._evict_from_busiest(waiter, now)
        return outcomes

    # --- shares --------------------------------------------------------------------------------------

    def _entitled(self) -> WaitingRequest | None:
        return self._shares.entitled(self.growths, self.admissions)

    def _missing(self, waiter: WaitingRequest) -> int:
        """Pages that would have to come free for it, besides those of sessions that leave."""
        needed = waiter.wanted
        if isinstance(waiter, AdmissionRequest):
            needed += self._growth_reserve(waiter.sequences)
        leaving = sum(allocation.held for allocation in self.allocations.values() if allocation.leaving)
        return needed - self.free - leaving

    def _reclaim_unused(self, waiter: WaitingRequest, now: float) -> None:
        """Have those above their share give back what was only set aside for them."""
        for allocation in _longest_idle(self.allocations.values()):
            surplus = self._shares.surplus(allocation.caller)
            pages = min(allocation.unused, surplus, self._missing(waiter))
            if allocation.caller != waiter.caller and pages > 0:
                self._return_unused(allocation, pages, now)

    def _evict_from_busiest(self, waiter: WaitingRequest, now: float) -> list[Outcome]:
        """With as many sessions as there may be: evict an idle one of the caller that has most of them."""
        if len(self.allocations) < self.max_sessions or isinstance(waiter, GrowthRequest):
            return []
        sessions = Counter(allocation.caller for allocation in self.allocations.values())
        [(caller, most)] = sessions.most_common(1)
        idle = [h for h in _longest_idle(self.allocations.values()) if h.caller == caller]
        if not idle or sessions[waiter.caller] + 1 >= most:
            return []
        return [self._evict(idle[0], "its client had the most sessions here, and another one waited", now)]

    def _evict_above_share(self, waiter: WaitingRequest, now: float) -> list[Outcome]:
        """Evict sessions of those above their share until there is, or will be, room for ``waiter``."""
        outcomes: list[Outcome] = []
        idle = _longest_idle(self.allocations.values())
        busy = [h for h in reversed(self.allocations.values()) if h.idle_since is None]
        for allocation in (*idle, *busy):
            if self._missing(waiter) <= 0:
                break
            if not allocation.held or allocation.leaving or allocation.caller == waiter.caller:
                continue
            if self._shares.surplus(allocation.caller):
                why = "its client held more than its share of the cache, and another one waited"
                outcomes.append(self._evict(allocation, why, now, leaving=allocation.idle_since is None))
        return outcomes

    def expire(self, now: float) -> list[Outcome]:
        """End the waits whose deadline has passed and the sessions that have been idle for too long."""
        outcomes: list[Outcome] = []
        for growth in [g for g in self.growths if g.deadline <= now]:
            why = "no room came free for the session to grow in the time given"
            outcomes.append(Refused(growth, self._full(why, growth.wanted, now)))
            self.stop_waiting(growth.allocation)
        for admission in [a for a in self.admissions if a.deadline <= now]:
            pages = admission.wanted + self._growth_reserve(admission.sequences)
            why = "no room came free for a new session in the time given"
            outcomes.append(Refused(admission, self._full(why, pages, now)))
            self.admissions.remove(admission)
        for allocation in list(self.allocations.values()):
            if (expires := self._expires(allocation)) is not None and expires <= now:
                self._return_unused(allocation, allocation.reserved, now)
            if allocation.idle_since is not None and allocation.idle_since + self.idle_timeout <= now:
                why = f"it was idle for {self.idle_timeout:g} seconds"
                outcomes.append(self._evict(allocation, why, now))
        return outcomes

    def next_wakeup(self, now: float) -> float | None:
        """The earliest time at which `expire` or `poll` may have something new to say by itself."""
        times = [growth.deadline for growth in self.growths]
        times += [admission.deadline for admission in self.admissions]
        for allocation in self.allocations.values():
            if allocation.idle_since is not None:
                grace_over = allocation.idle_since + self.idle_grace
                # One whose grace is over, and who is still here, was of no use to those who wait.
                pressed = self.growths and grace_over > now
                times.append(grace_over if pressed else allocation.idle_since + self.idle_timeout)
                times += [expires] if (expires := self._expires(allocation)) is not None else []
        if (waiter := self._entitled()) is not None and waiter.since + SHARE_GRACE > now:
            times.append(waiter.since + SHARE_GRACE)
        return min(times, default=None)

    def _expires(self, allocation: KVAllocation) -> float | None:
        """When pages that are set aside for the session, and that it does not use, are free again."""
        if not allocation.unused or allocation.idle_since is None:
            return None
        return allocation.idle_since + self.idle_grace

    def retry_after(self, pages: int, now: float) -> float:
        """How long, in seconds, until ``pages`` more may well be free.

        From how fast pages came free in the last minute, or when idle sessions end, whichever is sooner.
        """
        missing = pages - self.free
        best = self.idle_timeout
        rate = self._release_rate.at(now)
        if rate * best > missing > 0:
            best = missing / rate
        idle, unused = _longest_idle(self.allocations.values()), 0
        for allocation in idle:
            if (expires := self._expires(allocation)) is not None:
                unused += allocation.unused
                if unused >= missing:
                    best = min(best, expires - now)
                    break
        for allocation in idle:
            missing -= allocation.held
            if missing <= 0:
                best = min(best, (allocation.idle_since or 0.0) + self.idle_timeout - now)
                break
        return round(max(best, MIN_RETRY), 1)

    def _victim(self, missing: int, now: float) -> KVAllocation | None:
        """Who has to go first so that ``missing`` pages come free; None when nobody may be evicted for it."""
        holders = [h for h in self.allocations.values() if h.held]
        stale = [h for h in _longest_idle(holders) if (h.idle_since or 0.0) + self.idle_grace <= now]
        waiting = [h for h in holders if h.growth is not None]
        candidates = stale
        if len(stale) + len(waiting) == len(holders):
            candidates = stale + sorted(waiting, key=lambda h: -h.serial)
        return candidates[0] if sum(h.held for h in candidates) >= missing else None

    def _evict(self, allocation: KVAllocation, why: str, now: float, *, leaving: bool = False) -> Evicted:
        allocation.leaving = leaving
        if leaving:
            self.stop_waiting(allocation)
        else:
            self.release(allocation, now)
        return Evicted(allocation, SessionLostError(f"session {allocation.session[:8]} was ended: {why}"))

    def _full(self, why: str, pages: int, now: float) -> CacheFullError:
        wait = self.retry_after(pages, now)
        return CacheFullError(
            f"attention cache is full: {why} ({self.free * self.page} of {self.pages * self.page} tokens are "
            f"free, {pages * self.page} are needed); try again in {wait:g} s, or another server",
            retry_after=wait,
        )

    def _never_fits(self, pages: int) -> CacheFullError:
        return CacheFullError(
            f"this needs {pages * self.page} tokens of attention cache (whole pages of {self.page} for each "
            f"sequence) and the server has {self.pages * self.page} in all; use a shorter context, fewer "
            f"sequences or another server",
            retry_after=math.inf,
        )

    def __repr__(self) -> str:
        return (
            f"<KVCacheManager {self.held * self.page}/{self.pages * self.page} tokens · "
            f"{len(self.allocations)} sessions · {len(self.growths)} growing · "
            f"{len(self.admissions)} waiting>"
        )


def _longest_idle(allocations: Iterable[KVAllocation]) -> list[KVAllocation]:
    return sorted(
        (h for h in allocations if h.idle_since is not None), key=lambda h: (h.idle_since or 0.0, h.serial)
    )

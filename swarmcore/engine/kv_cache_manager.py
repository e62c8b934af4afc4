"""The attention cache as a budget: who holds how many pages, who waits for more, who has to go.

A plain object. It moves no memory and knows no clock: `KVCacheManager` is told what happens, with ``now``,
and answers with outcomes for its driver to carry out (`swarmcore.engine.engine`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from swarmcore.engine.cache_requests import (
    Admission,
    Admitted,
    Evicted,
    Grown,
    Growth,
    Holding,
    Outcome,
    Refused,
)
from swarmcore.engine.cache_shares import CacheShares
from swarmcore.errors import CacheFullError, SessionLostError

RELEASE_MEMORY = 60.0
"""Seconds over which the rate of released pages is averaged."""

SHARE_GRACE = 5.0
"""Seconds for which a caller waits for room within its share before one that holds more loses a session."""

MIN_RETRY = 0.5
"""Least `retry_after`, in seconds: a client that is told to wait should not be back at once."""


class KVCacheManager:
    """``tokens`` of attention cache, shared in pages of ``page`` tokens; never more is held than there is.

    Sessions grow as they go. One that grows comes before one that is new; each kind waits in line, in order.
    A new session is admitted only when some room is left for those that are there (one page for each
    sequence, an eighth of the budget at most), so that growth seldom has to wait at all. When it has to:

    - sessions idle for ``idle_grace`` seconds are evicted for it, the longest idle first;
    - when every session with pages waits for more, none could ever go on: the youngest is evicted.

    Without anyone waiting, a session is evicted after ``idle_timeout`` idle seconds, and what was set aside
    for it is free again when it has not begun to use it within ``idle_grace``.

    While callers contend (`CacheShares`) each has a right to an equal share. Whoever waits within its share
    comes first; those that hold more give back at once what was only set aside for them, and after
    `SHARE_GRACE` seconds sessions: idle ones first, then the youngest.
    """

    def __init__(
        self,
        tokens: int,
        page: int,
        *,
        idle_timeout: float = 600.0,
        idle_grace: float = 30.0,
        max_sessions: int = 1024,
        max_waiting: int = 1024,
    ) -> None:
        self.page = page
        self.pages = tokens // page
        self.held = 0
        self.idle_timeout = idle_timeout
        self.idle_grace = min(idle_grace, idle_timeout)
        self.max_sessions = max_sessions
        self.max_waiting = max_waiting
        self.holdings: dict[int, Holding] = {}
        self.admissions: deque[Admission] = deque()
        self.growths: deque[Growth] = deque()
        self._shares = CacheShares(self.pages)
        self._serial = 0
        self._sequences = 0
        self._release_rate = 0.0
        self._rate_at = -math.inf

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.pages - self.held

    # --- admission -----------------------------------------------------------------------------------

    def may_admit(self, sequences: int, pages: int) -> bool:
        """Whether a new session could be let in now, were it the first in line."""
        if len(self.holdings) >= self.max_sessions or any(map(self._comes_first, self.growths)):
            return False
        return pages + self._growth_reserve(sequences) <= self.free

    def request(
        self, session: str, sequences: int, tokens: int, deadline: float, now: float, caller: str = ""
    ) -> Admission:
        """Put a new session of ``caller`` in line for ``tokens`` of cache; `poll` tells when it is admitted.

        Raise `CacheFullError` when it could never be, or when the line is as long as it may be.
        """
        pages = sequences * -(-tokens // (sequences * self.page))
        if pages > self.pages:
            raise self._never_fits(pages)
        if len(self.admissions) >= self.max_waiting:
            raise self._full(f"{len(self.admissions)} sessions wait for attention cache already", pages, now)
        admission = Admission(session, sequences, pages, deadline, caller, now)
        self.admissions.append(admission)
        return admission

    def withdraw(self, admission: Admission) -> None:
        """Take a new session out of the line."""
        if admission in self.admissions:
            self.admissions.remove(admission)

    def _growth_reserve(self, sequences: int) -> int:
        return min(self._sequences + sequences, self.pages // 8) if self.held else 0

    def _admit(self, admission: Admission, now: float) -> Admitted:
        self._serial += 1
        pages = [0] * admission.sequences
        name, caller = admission.session, admission.caller
        holding = Holding(name, self._serial, pages, admission.pages, idle_since=now, caller=caller)
        self.holdings[holding.serial] = holding
        self._count(holding, holding.held)
        self._sequences += admission.sequences
        return Admitted(admission, holding)

    # --- growth, rollback, release -------------------------------------------------------------------

    def grow(self, holding: Holding, lengths: Sequence[int], deadline: float, now: float) -> bool:
        """Make room for sequences of ``lengths`` tokens; pages above that stay until `settle`.

        False when there is no room: the session then waits in line, and `poll` tells when it has grown.
        Raise `CacheFullError` when that could never be.
        """
        page = self.page
        pages = [max(old, -(-n // page)) for old, n in zip(holding.pages, lengths, strict=True)]
        if pages == holding.pages:
            return True
        if sum(pages) > self.pages:
            raise self._never_fits(sum(pages))
        growth = Growth(holding, pages, deadline, now)
        if growth.extra <= 0 or (not self.growths and growth.extra <= self.free):
            self._set_pages(holding, pages, now)
            return True
        holding.growth = growth
        self.growths.append(growth)
        return False

    def stop_waiting(self, holding: Holding) -> None:
        """The session no longer wants to grow."""
        if holding.growth is not None:
            self.growths.remove(holding.growth)
            holding.growth = None

    def settle(self, holding: Holding, lengths: Sequence[int], now: float) -> None:
        """The sequences are ``lengths`` tokens long now, and nothing more is under way: return the rest."""
        page = self.page
        pages = [-(-n // page) for n in lengths]
        if pages != holding.pages:
            self._set_pages(holding, pages, now)

    def release(self, holding: Holding, now: float) -> None:
        """The session is gone; all its pages are free."""
        if self.holdings.pop(holding.serial, None) is None:
            return
        self.stop_waiting(holding)
        self._sequences -= len(holding.pages)
        self._count(holding, -holding.held)
        self._note_released(holding.held, now)

    def _set_pages(self, holding: Holding, pages: list[int], now: float) -> None:
        before = holding.held
        holding.pages, holding.taken = pages, sum(pages)
        if holding.taken >= holding.promised:
            holding.promised = 0
        self._count(holding, holding.held - before)
        self._note_released(before - holding.held, now)

    def _count(self, holding: Holding, pages: int) -> None:
        self.held += pages
        self._shares.add(holding.caller, pages)

    def _give_back(self, holding: Holding, pages: int, now: float) -> None:
        """So many of the pages that are only set aside for the session are free again."""
        before = holding.held
        holding.promised = max(0, holding.promised - pages)
        self._count(holding, holding.held - before)
        self._note_released(before - holding.held, now)

    # --- what follows ------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Outcome]:
        """What can be granted now: growth first, then new sessions; and who has to go for it."""
        outcomes: list[Outcome] = []
        self._shares.weigh([g.caller for g in self.growths] + [a.caller for a in self.admissions])
        if (waiter := self._rightful()) is not None:
            self._take_back(waiter, now)
        while self.growths:
            growth = next(filter(self._comes_first, self.growths), self.growths[0])
            if growth.extra <= self.free:
                self.stop_waiting(growth.holding)
                self._set_pages(growth.holding, growth.pages, now)
                outcomes.append(Grown(growth.holding))
            elif victim := self._victim(growth.extra - self.free, now):
                outcomes.append(self._evict(victim, "the server needed its room for another session", now))
            else:
                break
        while self.admissions:
            admission = self._next_admission()
            if not self.may_admit(admission.sequences, admission.pages):
                break
            self.admissions.remove(admission)
            outcomes.append(self._admit(admission, now))
        if (waiter := self._rightful()) is not None and waiter.since + SHARE_GRACE <= now:
            outcomes += self._evict_surplus(waiter, now)
            outcomes += self._evict_crowd(waiter, now)
        return outcomes

    # --- shares --------------------------------------------------------------------------------------

    def _comes_first(self, waiter: Admission | Growth) -> bool:
        """Whether others have to wait for this one: it stays within its share, or there are no shares."""
        wanted = waiter.extra if isinstance(waiter, Growth) else waiter.pages
        return not self._shares.contended or self._shares.within(waiter.caller, wanted)

    def _next_admission(self) -> Admission:
        """The oldest of the caller that holds least; those above their share when there are no others."""
        rightful = filter(self._comes_first, self.admissions)
        first = min(rightful, key=lambda a: self._shares.held(a.caller), default=None)
        return first or self.admissions[0]

    def _rightful(self) -> Admission | Growth | None:
        """Who waits for room within its share while others contend."""
        if not self._shares.contended:
            return None
        growth = next(filter(self._comes_first, self.growths), None)
        if growth is not None or not self.admissions:
            return growth
        admission = self._next_admission()
        return admission if self._comes_first(admission) else None

    def _missing(self, waiter: Admission | Growth) -> int:
        """Pages that would have to come free for it, besides those of sessions that leave."""
        if isinstance(waiter, Growth):
            needed = waiter.extra
        else:
            needed = waiter.pages + self._growth_reserve(waiter.sequences)
        return needed - self.free - sum(holding.held for holding in self.holdings.values() if holding.leaving)

    def _take_back(self, waiter: Admission | Growth, now: float) -> None:
        """Have those above their share give back what was only set aside for them."""
        for holding in _longest_idle(self.holdings.values()):
            unused = holding.held - holding.taken
            surplus = self._shares.surplus(holding.caller)
            if holding.caller != waiter.caller and (pages := min(unused, surplus, self._missing(waiter))) > 0:
                self._give_back(holding, pages, now)

    def _evict_crowd(self, waiter: Admission | Growth, now: float) -> list[Outcome]:
        """Where all sessions that there may be are there: end an idle one of whoever has most of them."""
        if len(self.holdings) < self.max_sessions or isinstance(waiter, Growth):
            return []
        sessions = Counter(holding.caller for holding in self.holdings.values())
        [(caller, most)] = sessions.most_common(1)
        idle = [h for h in _longest_idle(self.holdings.values()) if h.caller == caller]
        if not idle or sessions[waiter.caller] + 1 >= most:
            return []
        return [self._evict(idle[0], "its client had the most sessions here, and another one waited", now)]

    def _evict_surplus(self, waiter: Admission | Growth, now: float) -> list[Outcome]:
        """Evict sessions of those above their share until there is, or will be, room for ``waiter``."""
        outcomes: list[Outcome] = []
        idle = _longest_idle(self.holdings.values())
        busy = [h for h in reversed(self.holdings.values()) if h.idle_since is None]
        for holding in (*idle, *busy):
            if self._missing(waiter) <= 0:
                break
            if not holding.held or holding.leaving or holding.caller == waiter.caller:
                continue
            if self._shares.surplus(holding.caller):
                why = "its client held more than its share of the cache, and another one waited"
                outcomes.append(self._evict(holding, why, now, leaving=holding.idle_since is None))
        return outcomes

    def expire(self, now: float) -> list[Outcome]:
        """End the waits whose deadline has passed and the sessions that have been idle for too long."""
        outcomes: list[Outcome] = []
        for growth in [g for g in self.growths if g.deadline <= now]:
            why = "no room came free for the session to grow in the time given"
            outcomes.append(Refused(growth, self._full(why, growth.extra, now)))
            self.stop_waiting(growth.holding)
        for admission in [a for a in self.admissions if a.deadline <= now]:
            pages = admission.pages + self._growth_reserve(admission.sequences)
            why = "no room came free for a new session in the time given"
            outcomes.append(Refused(admission, self._full(why, pages, now)))
            self.admissions.remove(admission)
        for holding in list(self.holdings.values()):
            if (expires := self._expires(holding)) is not None and expires <= now:
                self._give_back(holding, holding.promised, now)
            if holding.idle_since is not None and holding.idle_since + self.idle_timeout <= now:
                why = f"it was idle for {self.idle_timeout:g} seconds"
                outcomes.append(self._evict(holding, why, now))
        return outcomes

    def next_wakeup(self, now: float) -> float | None:
        """The earliest time at which `expire` or `poll` may have something new to say by itself."""
        times = [growth.deadline for growth in self.growths]
        times += [admission.deadline for admission in self.admissions]
        for holding in self.holdings.values():
            if holding.idle_since is not None:
                grace_over = holding.idle_since + self.idle_grace
                # One whose grace is over, and who is still here, was of no use to those who wait.
                pressed = self.growths and grace_over > now
                times.append(grace_over if pressed else holding.idle_since + self.idle_timeout)
                times += [expires] if (expires := self._expires(holding)) is not None else []
        if (waiter := self._rightful()) is not None and waiter.since + SHARE_GRACE > now:
            times.append(waiter.since + SHARE_GRACE)
        return min(times, default=None)

    def _expires(self, holding: Holding) -> float | None:
        """When pages that are set aside for the session, and that it does not use, are free again."""
        unused = holding.held > holding.taken and holding.idle_since is not None
        return (holding.idle_since or 0.0) + self.idle_grace if unused else None

    def retry_after(self, pages: int, now: float) -> float:
        """How long, in seconds, until ``pages`` more may well be free.

        From how fast pages came free in the last minute, or when idle sessions end, whichever is sooner.
        """
        missing = pages - self.free
        best = self.idle_timeout
        rate = self._rate(now)
        if rate * best > missing > 0:
            best = missing / rate
        idle, unused = _longest_idle(self.holdings.values()), 0
        for holding in idle:
            if (expires := self._expires(holding)) is not None:
                unused += holding.held - holding.taken
                if unused >= missing:
                    best = min(best, expires - now)
                    break
        for holding in idle:
            missing -= holding.held
            if missing <= 0:
                best = min(best, (holding.idle_since or 0.0) + self.idle_timeout - now)
                break
        return round(max(best, MIN_RETRY), 1)

    def _victim(self, missing: int, now: float) -> Holding | None:
        """Who has to go first so that ``missing`` pages come free; None when nobody may be evicted for it."""
        holders = [h for h in self.holdings.values() if h.held]
        stale = [h for h in _longest_idle(holders) if (h.idle_since or 0.0) + self.idle_grace <= now]
        waiting = [h for h in holders if h.growth is not None]
        candidates = stale
        if len(stale) + len(waiting) == len(holders):
            candidates = stale + sorted(waiting, key=lambda h: -h.serial)
        return candidates[0] if sum(h.held for h in candidates) >= missing else None

    def _evict(self, holding: Holding, why: str, now: float, *, leaving: bool = False) -> Evicted:
        holding.leaving = leaving
        if leaving:
            self.stop_waiting(holding)
        else:
            self.release(holding, now)
        return Evicted(holding, SessionLostError(f"session {holding.session[:8]} was ended: {why}"))

    def _note_released(self, pages: int, now: float) -> None:
        if pages > 0:
            self._release_rate = self._rate(now) + pages / RELEASE_MEMORY
            self._rate_at = now

    def _rate(self, now: float) -> float:
        return self._release_rate * math.exp((self._rate_at - now) / RELEASE_MEMORY)

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
            f"{len(self.holdings)} sessions · {len(self.growths)} growing · {len(self.admissions)} waiting>"
        )


def _longest_idle(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(
        (h for h in holdings if h.idle_since is not None), key=lambda h: (h.idle_since or 0.0, h.serial)
    )

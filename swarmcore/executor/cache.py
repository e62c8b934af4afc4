"""The attention cache as a budget: who holds how many pages, who waits for more, who has to go.

A plain object. It moves no memory and knows no clock: `CacheBudget` is told what happens, with ``now``, and
answers with outcomes for its driver to carry out (`swarmcore.executor.engine`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import attrs

from swarmcore.errors import CacheFullError, SessionLostError

RELEASE_MEMORY = 60.0
"""Seconds over which the rate of released pages is averaged."""

MIN_RETRY = 0.5
"""Least `retry_after`, in seconds: a client that is told to wait should not be back at once."""


@attrs.define(eq=False)
class Holding:
    """One session's share of the budget."""

    session: str
    serial: int
    """Order of admission: the higher, the younger."""
    pages: list[int]
    """Pages of each of its sequences."""
    promised: int
    """Pages set aside at admission; 0 once the session has grown into them."""
    idle_since: float | None
    """When its last step ended, or None while it has steps to run."""
    taken: int = 0
    growth: Growth | None = None
    """What it waits for."""

    @property
    def held(self) -> int:
        """Pages that nobody else can have."""
        return max(self.taken, self.promised)


@attrs.define(eq=False)
class Admission:
    """A new session that waits for room."""

    session: str
    sequences: int
    pages: int
    deadline: float


@attrs.define(eq=False)
class Growth:
    """An admitted session that waits for more pages."""

    holding: Holding
    pages: list[int]
    deadline: float

    @property
    def extra(self) -> int:
        return sum(self.pages) - self.holding.held


@attrs.frozen
class Admitted:
    request: Admission
    holding: Holding


@attrs.frozen
class Grown:
    holding: Holding


@attrs.frozen
class Refused:
    """The deadline of the wait passed."""

    waiter: Admission | Growth
    error: CacheFullError


@attrs.frozen
class Evicted:
    """The session's pages are free again; it is idle or was waiting, never computing."""

    holding: Holding
    error: SessionLostError


Outcome = Admitted | Grown | Refused | Evicted


class CacheBudget:
    """``tokens`` of attention cache, shared in pages of ``page`` tokens; never more is held than there is.

    Sessions grow as they go. One that grows comes before one that is new; each kind waits in line, in order.
    A new session is admitted only when some room is left for those that are there (one page for each
    sequence, an eighth of the budget at most), so that growth seldom has to wait at all. When it has to:

    - sessions idle for ``idle_grace`` seconds are evicted for it, the longest idle first;
    - when every session with pages waits for more, none could ever go on: the youngest is evicted.

    Without anyone waiting, a session is evicted after ``idle_timeout`` idle seconds.
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
        if self.growths or len(self.holdings) >= self.max_sessions:
            return False
        return pages + self._growth_reserve(sequences) <= self.free

    def request(self, session: str, sequences: int, tokens: int, deadline: float, now: float) -> Admission:
        """Put a new session in line for ``tokens`` of cache; `poll` tells when it is admitted.

        Raise `CacheFullError` when it could never be, or when the line is as long as it may be.
        """
        pages = sequences * -(-tokens // (sequences * self.page))
        if pages > self.pages:
            raise self._never_fits(pages)
        if len(self.admissions) >= self.max_waiting:
            raise self._full(f"{len(self.admissions)} sessions wait for attention cache already", pages, now)
        admission = Admission(session, sequences, pages, deadline)
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
        holding = Holding(admission.session, self._serial, pages, admission.pages, idle_since=now)
        self.holdings[holding.serial] = holding
        self.held += holding.held
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
        growth = Growth(holding, pages, deadline)
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
        self.held -= holding.held
        self._note_released(holding.held, now)

    def _set_pages(self, holding: Holding, pages: list[int], now: float) -> None:
        before = holding.held
        holding.pages, holding.taken = pages, sum(pages)
        if holding.taken >= holding.promised:
            holding.promised = 0
        self.held += holding.held - before
        self._note_released(before - holding.held, now)

    # --- what follows ------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Outcome]:
        """What can be granted now: growth first, then new sessions; and who has to go for it."""
        outcomes: list[Outcome] = []
        while self.growths:
            growth = self.growths[0]
            if growth.extra <= self.free:
                self.stop_waiting(growth.holding)
                self._set_pages(growth.holding, growth.pages, now)
                outcomes.append(Grown(growth.holding))
            elif victim := self._victim(growth.extra - self.free, now):
                outcomes.append(self._evict(victim, "the server needed its room for another session", now))
            else:
                break
        while self.admissions and self.may_admit(self.admissions[0].sequences, self.admissions[0].pages):
            outcomes.append(self._admit(self.admissions.popleft(), now))
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
        return min(times, default=None)

    def retry_after(self, pages: int, now: float) -> float:
        """How long, in seconds, until ``pages`` more may well be free.

        From how fast pages came free in the last minute, or when idle sessions end, whichever is sooner.
        """
        missing = pages - self.free
        best = self.idle_timeout
        rate = self._rate(now)
        if rate * best > missing > 0:
            best = missing / rate
        for holding in _longest_idle(self.holdings.values()):
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

    def _evict(self, holding: Holding, why: str, now: float) -> Evicted:
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
            f"<CacheBudget {self.held * self.page}/{self.pages * self.page} tokens · "
            f"{len(self.holdings)} sessions · {len(self.growths)} growing · {len(self.admissions)} waiting>"
        )


def _longest_idle(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(
        (h for h in holdings if h.idle_since is not None), key=lambda h: (h.idle_since or 0.0, h.serial)
    )

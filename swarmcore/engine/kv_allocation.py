"""Attention cache as `KVCacheManager` accounts for it: in pages; by session, by caller, and over time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import attrs

from swarmcore.errors import CacheFullError, SessionLostError

RELEASE_MEMORY = 60.0
"""Seconds over which the rate of released pages is averaged."""


@attrs.frozen
class PageSize:
    """How tokens of one session's sequences are counted in pages. All such arithmetic is done here.

    A page of the server's cache has room for ``tokens`` tokens in ``all_blocks`` blocks. A session that
    passes through ``blocks`` of them takes that part of a page for as many tokens.
    """

    tokens: int
    blocks: int = 1
    all_blocks: int = 1
    prefix_tokens: int = 0
    """Cached positions before the first token of each sequence."""

    def pages(self, length: int) -> int:
        """Pages that a sequence of ``length`` tokens takes, rounded up; none as long as it is empty."""
        if not length:
            return 0
        own = -(-(length + self.prefix_tokens) // self.tokens)
        return -(-own * self.blocks // self.all_blocks)

    def room(self, pages: int) -> int:
        """Tokens, those of the prefix included, for which ``pages`` pages of a sequence have room."""
        return pages * self.all_blocks // self.blocks * self.tokens


@attrs.define(eq=False)
class KVAllocation:
    """The pages of one session."""

    session: str
    serial: int
    """Order of admission: the higher, the younger."""
    page: PageSize
    pages: list[int]
    """Pages of each of its sequences."""
    reserved: int
    """Pages set aside at admission; 0 once the session has grown into them."""
    idle_since: float | None
    """When its last step ended, or None while it has steps to run."""
    used: int = 0
    growth: GrowthRequest | None = None
    """What it waits for."""
    caller: str = ""
    leaving: bool = False
    """Whether it was evicted while it may compute: its driver releases it as soon as it does not."""

    @property
    def held(self) -> int:
        """Pages that nobody else can have."""
        return max(self.used, self.reserved)

    @property
    def unused(self) -> int:
        """Pages that are only set aside for it."""
        return self.held - self.used

    @property
    def room(self) -> list[int]:
        """Tokens that each sequence has room for."""
        return [self.page.room(pages) for pages in self.pages]

    def pages_for(self, lengths: Iterable[int]) -> list[int]:
        """Pages that its sequences take when they are so many tokens long."""
        return [self.page.pages(length) for length in lengths]


@attrs.define(eq=False)
class AdmissionRequest:
    """A new session that waits for room."""

    session: str
    sequences: int
    page: PageSize
    wanted: int
    """Pages, for all of its sequences together."""
    deadline: float
    caller: str = ""
    since: float = 0.0


@attrs.define(eq=False)
class GrowthRequest:
    """An admitted session that waits for more pages."""

    allocation: KVAllocation
    pages: list[int]
    deadline: float
    since: float = 0.0

    @property
    def caller(self) -> str:
        return self.allocation.caller

    @property
    def wanted(self) -> int:
        """Pages that it has to get besides those that it holds."""
        return sum(self.pages) - self.allocation.held


WaitingRequest = AdmissionRequest | GrowthRequest


@attrs.frozen
class Admitted:
    request: AdmissionRequest
    allocation: KVAllocation


@attrs.frozen
class Grown:
    allocation: KVAllocation


@attrs.frozen
class Refused:
    """The deadline of the wait passed."""

    waiter: WaitingRequest
    error: CacheFullError


@attrs.frozen
class Evicted:
    """The session has to go. Its pages are free again when it is idle or was waiting; with
    `KVAllocation.leaving` its driver releases them, at once unless it computes."""

    allocation: KVAllocation
    error: SessionLostError


Outcome = Admitted | Grown | Refused | Evicted


class FairShares:
    """Pages held by each caller (the peer that sessions are for), and what an equal share would be.

    Shares matter only while callers contend: while one waits, and another one holds something.
    """

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._held: Counter[str] = Counter()
        self._share = float(pages)
        self.contended = False
        """Whether more than one caller holds something or waits."""

    def add(self, caller: str, pages: int) -> None:
        """A caller holds so many more, or fewer."""
        self._held[caller] += pages
        if not self._held[caller]:
            del self._held[caller]

    def update(self, waiting: Iterable[str]) -> None:
        """Work out the share anew, when these callers wait."""
        callers = {*self._held, *waiting}
        self.contended = len(callers) > 1
        self._share = self._pages / max(1, len(callers))

    def held(self, caller: str) -> int:
        return self._held[caller]

    def within(self, caller: str, extra: int) -> bool:
        """Whether the caller would hold no more than its share with ``extra`` pages."""
        return self._held[caller] + extra <= self._share

    def surplus(self, caller: str) -> int:
        """Pages that the caller holds above its share."""
        return max(0, math.ceil(self._held[caller] - self._share))

    def comes_first(self, waiter: WaitingRequest) -> bool:
        """Whether others have to wait for this one: it stays within its share, or there are no shares."""
        return not self.contended or self.within(waiter.caller, waiter.wanted)

    def next_admission(self, admissions: Sequence[AdmissionRequest]) -> AdmissionRequest:
        """The oldest of the caller that holds least; those above their share when there are no others."""
        first = filter(self.comes_first, admissions)
        return min(first, key=lambda each: self._held[each.caller], default=admissions[0])

    def entitled(
        self, growths: Iterable[GrowthRequest], admissions: Sequence[AdmissionRequest]
    ) -> WaitingRequest | None:
        """Who waits for room within its share while others contend; the first in its queue."""
        if not self.contended:
            return None
        growth = next(filter(self.comes_first, growths), None)
        if growth is not None or not admissions:
            return growth
        admission = self.next_admission(admissions)
        return admission if self.comes_first(admission) else None


class ReleaseRate:
    """How fast pages came free of late, in pages per second."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._measured_at = -math.inf

    def note(self, pages: int, now: float) -> None:
        """So many pages came free; negative numbers are passed over."""
        if pages > 0:
            self._rate = self.at(now) + pages / RELEASE_MEMORY
            self._measured_at = now

    def at(self, now: float) -> float:
        return self._rate * math.exp((self._measured_at - now) / RELEASE_MEMORY)

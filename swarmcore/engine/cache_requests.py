"""What the attention cache is asked for, what is held of it, and what `KVCacheManager` decides."""

from __future__ import annotations

import attrs

from swarmcore.errors import CacheFullError, SessionLostError


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
    caller: str = ""
    leaving: bool = False
    """Whether it was evicted while it may compute: its driver releases it as soon as it does not."""

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
    caller: str = ""
    since: float = 0.0


@attrs.define(eq=False)
class Growth:
    """An admitted session that waits for more pages."""

    holding: Holding
    pages: list[int]
    deadline: float
    since: float = 0.0

    @property
    def caller(self) -> str:
        return self.holding.caller

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
    """The session has to go. Its pages are free again when it is idle or was waiting; with
    `Holding.leaving` its driver releases them, at once unless it computes."""

    holding: Holding
    error: SessionLostError


Outcome = Admitted | Grown | Refused | Evicted

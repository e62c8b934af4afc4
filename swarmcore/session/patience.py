"""How long a step is waited for, and how often what failed is tried again. Plain objects.

A server is judged by whether it gets on, not by how fast: one that computes one token a second is as good as
one that computes a hundred thousand, while there is progress. What counts against it is time in which
nothing at all became more.
"""

from __future__ import annotations

import math
from typing import Literal

import attrs

from swarmcore.errors import BusyError, DeadlineExceededError, MissingBlocksError, SwarmError
from swarmcore.pacing import Backoff

RESENDS = 3
"""How often a step that its server does not have is sent again before the stage counts as lost."""

QUEUED = 4.0
"""Times the step's timeout for which other people's progress at a server counts, where others would do."""

ALONE = 10.0
"""Times the step's timeout that a server without progress is given when nobody else has its blocks: to open
the session there again would not make it any faster."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two attempts at something that is missing or broken; twice as long each time."""

BUSY_PAUSE, LONGEST_BUSY_PAUSE = 1.0, 20.0
"""The same for a server that has no room or memory now: to ask at once would only keep it busy."""

MAX_FAILURES = 32
"""Failures within one step: one that brings down every server it comes to must not go on for ever."""

Verdict = Literal["wait", "resend", "replace", "give up"]


class StepPatience:
    """Decides what to do about a step that is under way. ``timeout`` is in seconds, as all times.

    Told of progress and asked for a verdict with ``now``. A step that its server ``holds`` is waited for; one
    that it does not have is sent again, every quarter of the timeout. After ``timeout`` without progress the
    server is replaced. Progress of others at a server where the step waits its turn counts as well, for a
    time. Where nobody else has the blocks (``alone``) a server that holds the step is given ten times as
    long, and then it is the caller who is told.
    """

    def __init__(self, now: float, timeout: float) -> None:
        self._timeout = timeout
        self._own = now
        self._latest = now
        self._resends = 0

    def __repr__(self) -> str:
        return f"<StepPatience since {self._latest:.1f} s · {self._resends} resends>"

    @property
    def judge_after(self) -> float:
        """Seconds without progress after which a verdict is worth asking for."""
        return self._timeout / (RESENDS + 1)

    def progressed(self, now: float) -> None:
        """The step, or one before it in its session, got further."""
        self._own = self._latest = now
        self._resends = 0

    def others_progressed(self, now: float) -> None:
        """The server where the step waits its turn got further with other work."""
        self._latest = now

    def judge(self, now: float, *, held: bool, alone: bool) -> Verdict:
        """What to do now, where the server has the step (``held``) or not, and others its blocks or not."""
        idle = now - self._latest
        if not held and self._resends < RESENDS and idle >= (self._resends + 1) * self.judge_after:
            self._resends += 1
            return "resend"
        if alone and held:
            return "give up" if idle >= ALONE * self._timeout else "wait"
        passed_over = not alone and now - self._own >= QUEUED * self._timeout
        return "replace" if idle >= self._timeout or passed_over else "wait"


@attrs.define
class RetryPolicy:
    """Decides when to try again what failed, and when to give up: after ``patience`` seconds.

    A first failure is repaired at once, further ones after pauses that double. A server that has no room or
    memory is left alone for longer each time, until a step gets through.
    """

    patience: float
    failures: int = 0
    """Since the last step that got through, less those where nobody was there to try."""
    _since: float | None = None
    _pauses: Backoff = attrs.field(factory=lambda: Backoff(FIRST_PAUSE, LONGEST_PAUSE))
    _busy_since: float | None = None
    _busy_pauses: Backoff = attrs.field(factory=lambda: Backoff(BUSY_PAUSE, LONGEST_BUSY_PAUSE))

    @property
    def busy(self) -> bool:
        """Whether a server had no room or memory since the last step that got through."""
        return self._busy_since is not None

    def failed(self, now: float, error: SwarmError) -> float:
        """Seconds to wait before the next attempt; infinite when there should be none."""
        if not isinstance(error, MissingBlocksError):
            self.failures += 1
        if self.failures > MAX_FAILURES:
            return math.inf
        if isinstance(error, BusyError) and not isinstance(error, DeadlineExceededError):
            self._busy_since = now if self._busy_since is None else self._busy_since
            since, pause = self._busy_since, self._busy_pauses.next()
        else:
            self._since = now if self._since is None else self._since
            since, pause = self._since, self._pauses.next()
        return pause if now + pause <= since + self.patience else math.inf

    def replaced(self) -> None:
        """Another server has taken over. Whether it will do better is yet to be seen."""
        self.failures += 1
        self._since = None
        self._pauses.reset()

    def succeeded(self) -> None:
        """A step got through."""
        if not self.failures and self._since is None and self._busy_since is None:
            return
        self._since = self._busy_since = None
        self.failures = 0
        self._pauses.reset()
        self._busy_pauses.reset()

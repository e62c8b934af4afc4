"""Whether a batch of decode steps waits for others that are about to come. A plain object.

A pass over the blocks takes hardly longer for many tokens than for one, and sessions that decode come back
again and again. If a batch left with whoever is there, the sessions would fall apart into small groups, each
with passes of its own, and stay so; sessions that were once waited for stay together. So it is followed how
long passes take and when sessions return, and from that comes in how many groups they go through best: in one
where they are back before a pass is over, in several that take turns where they are away for longer, as on a
chain of servers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import attrs

LATE = 1.25
"""A session counts for up to this many times its usual time to return; then it is taken to be elsewhere."""

SMOOTHING = 0.3
"""Weight of the latest return in a session's usual time to return, and of the latest gap in a burst."""

NEARLY = 0.98
"""Fewer groups are taken where they bring this part of the most steps per second: larger batches cost less
of the processor, and of everything else on the way."""

PUNCTUAL = 0.3
"""A session that is off by more than this part of its time away, and of a pass, is not waited for."""

LASTS = 4
"""For so many passes sessions are taken to stay together, once they are."""

ON_TIME = 0.1
"""Nobody is on time to the millisecond: this part of a pass is added to when a session is expected."""

BURST = 0.25
"""Steps that come within this part of a pass of each other were together elsewhere: more may follow."""

GAPS = 3
"""So many usual gaps without another step end a burst,"""

BURST_END = 0.5
"""and no more than this part of a pass."""

FORGET = 0.95
"""What is left of the weight of a pass in `PassTimes` with each that comes after it."""

ROW = 0.04
"""Part of the time of a pass of one step that each further step adds, as long as nothing else is known."""

PRIOR = 0.1
"""Weight of that: what is measured outweighs it when passes differ by a step or so."""


class PassTimes:
    """How long a pass takes, by the number of its steps: a part that every pass takes, and one for each step.

    Follows the passes of late, so that a machine that others use shows, and caches that grow.
    """

    def __init__(self) -> None:
        self._weight = self._steps = self._seconds = self._squares = self._products = 0.0
        self.fixed = 0.0
        """Seconds of every pass; 0 before one was seen."""
        self.each = 0.0
        """Seconds more for each of its steps."""

    def note(self, steps: int, seconds: float) -> None:
        """A pass of so many decode steps, and nothing else, took ``seconds``."""
        if self._weight:  # one that took long says nothing about the next
            seconds = min(seconds, 2 * (self.fixed + self.each * steps))
        self._weight = FORGET * self._weight + 1
        self._steps = FORGET * self._steps + steps
        self._seconds = FORGET * self._seconds + seconds
        self._squares = FORGET * self._squares + steps * steps
        self._products = FORGET * self._products + steps * seconds
        mean_steps, mean_seconds = self._steps / self._weight, self._seconds / self._weight
        # Passes that are all of one size say nothing of a slope.
        usual = ROW * mean_seconds / (1 + ROW * mean_steps)
        variance = max(self._squares / self._weight - mean_steps**2, 0.0)
        covariance = self._products / self._weight - mean_steps * mean_seconds
        slope = (covariance + PRIOR * usual) / (variance + PRIOR)
        self.each = min(max(slope, 0.0), 0.8 * mean_seconds / mean_steps)
        self.fixed = mean_seconds - self.each * mean_steps


@attrs.define
class _Rhythm:
    """When a session that decodes comes back."""

    group: Hashable
    answered: float | None = None
    """When its last step was answered; None while a step is here."""
    away: float | None = None
    """Usual seconds from there to its next step; None until one was seen."""
    deviation: float = 0.0
    """By how much they usually differ from that."""

    def arrived(self, now: float) -> None:
        if self.answered is None:
            return
        took, self.answered = now - self.answered, None
        if self.away is None:
            self.away, self.deviation = took, took / 8
            return
        # One long absence says nothing about the next.
        off = min(took, 2 * self.away) - self.away
        self.away += SMOOTHING * off
        self.deviation += SMOOTHING * (abs(off) - self.deviation)


@attrs.frozen
class _Absent:
    """A session that is expected back."""

    away: float
    due: float
    """When it usually comes."""
    by: float
    """When it should be here."""
    punctual: bool


@attrs.frozen
class BatchWait:
    """Wait until loop time ``until``, or until ``steps`` decode steps are there; then ask again."""

    until: float
    steps: int


class BatchWindow:
    """Knows the sessions that decode. One that decodes alone is never made to wait.

    Sessions share batches within a ``group``, such as those that go through the same blocks.
    """

    def __init__(self, *, turns: bool = True) -> None:
        """Without ``turns`` there are no groups that take turns: whoever comes in time is waited for."""
        self.passes = PassTimes()
        self._turns = turns
        self._sessions: dict[Hashable, _Rhythm] = {}
        self._last_arrival = -math.inf
        self._gap = 0.0
        """Usual seconds between two steps of a burst."""

    def arrived(self, session: Hashable, now: float, group: Hashable = None) -> None:
        """A decode step of the session is here."""
        rhythm = self._sessions.setdefault(session, _Rhythm(group))
        rhythm.group = group
        rhythm.arrived(now)
        gap, self._last_arrival = now - self._last_arrival, now
        if gap < BURST * self.passes.fixed:
            self._gap += SMOOTHING * (gap - self._gap)

    def answered(self, session: Hashable, now: float) -> None:
        """The session has the result of its step."""
        if (rhythm := self._sessions.get(session)) is not None:
            rhythm.answered = now

    def closed(self, session: Hashable) -> None:
        """The session brings no more steps."""
        self._sessions.pop(session, None)

    def wait(self, here: int, since: float, now: float, group: Hashable = None) -> BatchWait | None:
        """What to wait for when a batch of ``here`` decode steps could leave, as it can since ``since``.

        None lets it go. It waits for no longer than the fixed part of a pass, and only where that pays: those
        who wait lose the time, those who are waited for are spared what is left of a pass, and later passes.
        """
        fixed = self.passes.fixed
        latest = since + fixed
        absent = self._absent(now, group)
        missing = self._batch_size(here, absent) - here
        if missing <= 0 or now >= latest:
            return None
        wait = None
        on_time = sorted((a for a in absent if a.punctual and a.by > now), key=lambda a: a.due)[:missing]
        for more, session in enumerate(on_time, 1):
            seconds = max(session.due - now, 0.0)
            if LASTS * more * (fixed - seconds) > here * seconds:
                wait = BatchWait(min(session.by, latest), here + more)
        burst = min(self._last_arrival + min(GAPS * self._gap, BURST_END * fixed), latest)
        if burst > now and (wait is None or burst > wait.until):
            wait = BatchWait(burst, here + missing)
        return wait

    def _absent(self, now: float, group: Hashable) -> list[_Absent]:
        fixed, absent = self.passes.fixed, []
        for rhythm in self._sessions.values():
            if rhythm.group == group and rhythm.answered is not None and rhythm.away is not None:
                due = rhythm.answered + rhythm.away
                by = due + rhythm.deviation + ON_TIME * fixed
                if now < max(by, rhythm.answered + LATE * rhythm.away):
                    punctual = rhythm.deviation < max(fixed, PUNCTUAL * rhythm.away)
                    absent.append(_Absent(rhythm.away, due, by, punctual))
        return absent

    def _batch_size(self, here: int, absent: Sequence[_Absent]) -> int:
        """How many steps batches should have, for the most steps per second."""
        steps = here + len(absent)
        if not absent or not self._turns:
            return steps
        away = sum(session.away for session in absent) / len(absent)

        def lap(groups: int) -> float:
            """Seconds in which each session has one step done: they take turns here, or the way round."""
            seconds = self.passes.fixed + self.passes.each * steps / groups
            return max(groups * seconds, away + seconds)

        laps = [lap(groups) for groups in range(1, steps + 1)]
        best = min(laps)
        groups = next(n for n, seconds in enumerate(laps, 1) if NEARLY * seconds <= best)
        return math.ceil(steps / groups)

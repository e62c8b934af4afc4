"""Whether a batch of decode steps waits for others that are about to come. A plain object.

A pass over the blocks takes hardly longer for many tokens than for one, and sessions that decode come back
again and again. If a batch left with whoever is there, the sessions would fall apart into small groups, each
with passes of its own, and stay so. So each session's usual time to return is followed, and it is waited
for where that pays: those who wait lose the time of the wait, those who are waited for gain what is left of a
pass.
"""

from __future__ import annotations

import attrs

FIXED = 0.6
"""Part of the time of a pass that does not depend on the number of its tokens."""

LATE = 1.25
"""A session is expected up to this many times its usual time to return; then it is not waited for."""

SMOOTHING = 0.3
"""Weight of the latest return in a session's usual time to return."""


@attrs.define
class _ReturnTime:
    answered: float | None = None
    """When its last step was answered; None while a step is here."""
    returns: float | None = None
    """Usual seconds from there to its next step; None until one was seen."""


@attrs.frozen
class BatchWait:
    """Wait until loop time ``until``, or until ``steps`` decode steps are there."""

    until: float
    steps: int


class BatchWindow:
    """Knows the sessions that decode. One that decodes alone is never made to wait."""

    def __init__(self) -> None:
        self._times: dict[str, _ReturnTime] = {}

    def arrived(self, session: str, now: float) -> None:
        """A decode step of the session is here."""
        times = self._times.setdefault(session, _ReturnTime())
        if times.answered is not None:
            took = now - times.answered
            usual = took if times.returns is None else times.returns
            # One long absence says nothing about the next.
            times.returns = usual + SMOOTHING * (min(took, 2 * usual) - usual)
            times.answered = None

    def answered(self, session: str, now: float) -> None:
        """The session has the result of its step."""
        if (times := self._times.get(session)) is not None:
            times.answered = now

    def closed(self, session: str) -> None:
        """The session brings no more steps."""
        self._times.pop(session, None)

    def wait(self, here: int, pass_seconds: float, now: float) -> BatchWait | None:
        """What to wait for when a batch of ``here`` decode steps could leave ``now``; None: let it go.

        With ``pass_seconds`` for a pass, waiting ``w`` seconds for ``m`` more steps pays when
        ``m * (fixed part of a pass - w) > here * w``.
        """
        fixed = FIXED * pass_seconds
        waits = sorted(
            max(times.answered + times.returns, now) - now
            for times in self._times.values()
            if times.answered is not None
            and times.returns is not None
            and times.answered + LATE * times.returns > now
            and times.answered + times.returns < now + fixed
        )
        pays = [more for more, wait in enumerate(waits, 1) if more * (fixed - wait) > here * wait]
        if not pays:
            return None
        # Nobody is on time to the millisecond: a little more, for as many.
        return BatchWait(now + waits[pays[-1] - 1] + 0.1 * fixed, here + pays[-1])

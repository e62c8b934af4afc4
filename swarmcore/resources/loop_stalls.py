"""Stalls of the event loop: callbacks that run for so long that everything else waits."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

logger = logging.getLogger(__name__)

THRESHOLD = 0.1
"""Seconds that the loop may be late before that is counted."""

WARNED = 1.0
"""Seconds of one callback that are warned of: others begin to wait for this peer."""

ELSEWHERE = "another thread or program"
"""The place of what kept the loop from running while it had nothing to do itself, such as an import."""

_TICK = 0.05
_LOG_GAP = 60.0
_MOST_PLACES = 64


class LoopStalls:
    """Counts them by the place in the code that ran meanwhile. A plain object: ``now`` is passed in."""

    def __init__(self) -> None:
        self.count = 0
        self.longest = 0.0
        """Seconds."""
        self.places: Counter[str] = Counter()
        """How often, by the function that held it up; the rarest are forgotten first."""
        self._logged_at = float("-inf")
        self._not_logged = 0
        self._warned = False

    def stalled(self, seconds: float, place: str, now: float) -> str:
        """The loop was late by ``seconds`` because of ``place``.

        Return the warning to log, at most once a minute; otherwise nothing, as always for what is short or
        was `ELSEWHERE`: a busy machine, a thread that imports.
        """
        self.count += 1
        self.longest = max(self.longest, seconds)
        self.places[place] += 1
        if len(self.places) > _MOST_PLACES:
            del self.places[min(self.places, key=lambda one: (self.places[one], one == place))]
        if seconds < WARNED or place == ELSEWHERE:
            return ""
        self._not_logged += 1
        self._warned = True
        if now - self._logged_at < _LOG_GAP:
            return ""
        more = f"; {self._not_logged} times since this was last said" if self._not_logged > 1 else ""
        self._logged_at, self._not_logged = now, 0
        return f"the event loop was held up for {1000 * seconds:.0f} ms by {place}{more}"

    @property
    def note(self) -> str:
        """All that was counted, in a line; empty when there was nothing to warn of."""
        if not self._warned:
            return ""
        [(place, often)] = self.places.most_common(1)
        return (
            f"event loop: held up {self.count} times, for {1000 * self.longest:.0f} ms at most; "
            f"{often} times by {place}"
        )


@contextmanager
def watch_loop(loop_stalls: LoopStalls, *, places: bool = False) -> Iterator[None]:
    """Count in ``loop_stalls`` what holds up the event loop within this block, and warn of what is long.

    With ``places`` it is found out which function does; that takes ``SIGALRM``, and is for programs that have
    their main thread to themselves. Elsewhere every place is ``"?"``.
    """
    watchdog = _Watchdog(loop_stalls)
    able = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
    with watchdog.alarms() if places and able else nullcontext():
        try:
            yield
        finally:
            watchdog.stop()


class _Watchdog:
    """Calls itself again and again and sees how late it is."""

    def __init__(self, loop_stalls: LoopStalls) -> None:
        self._loop_stalls = loop_stalls
        self._loop = asyncio.get_running_loop()
        self._place = "?"
        self._alarmed = False
        self._next = self._loop.call_later(_TICK, self._tick)

    def stop(self) -> None:
        self._next.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        late = now - self._next.when()
        if late > THRESHOLD:
            line = self._loop_stalls.stalled(late, self._place, now)
            if line:
                logger.warning("%s", line)
        self._place = "?"
        self._next = self._loop.call_later(_TICK, self._tick)
        if self._alarmed:
            self._set_alarm()

    def _set_alarm(self) -> None:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, _TICK + THRESHOLD)

    @contextmanager
    def alarms(self) -> Iterator[None]:
        """Have the kernel interrupt what makes the next tick late, to see what it is."""
        assert sys.platform != "win32"
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.siginterrupt(signal.SIGALRM, False)
        self._alarmed = True
        self._set_alarm()
        try:
            yield
        finally:
            self._alarmed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self._place = _place(frame)


def _place(frame: FrameType | None) -> str:
    """The innermost function of ours, or else of anybody, in the loop's callback that ``frame`` is in."""
    ours = innermost = ""
    while frame is not None and frame.f_code is not asyncio.Handle._run.__code__:
        place = f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}"
        innermost = innermost or place
        if not ours and place.startswith("swarmcore"):
            ours = place
        frame = frame.f_back
    return ELSEWHERE if frame is None else ours or innermost or "?"

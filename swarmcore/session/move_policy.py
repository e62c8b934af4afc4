"""Whether a live session is worth moving to a better chain."""

from __future__ import annotations

import attrs

from swarmcore.types import PeerId


@attrs.frozen(kw_only=True)
class MoveLimits:
    """How much better a chain has to be."""

    gain: float = 0.25
    """Part of the time of a token that it must save at least."""
    hold: float = 10.0
    """Seconds for which it must do so: figures that jump up and down move nobody."""
    interval: float = 60.0
    """Seconds between two moves of a session, and before the first."""


class MovePolicy:
    """Decides for one session, whenever its owner compares chains. A plain object.

    A move pays when what it saves on the tokens still to come is more than what it costs to replay those
    that are there. A generation is expected to go on for as long again as it has gone already.
    """

    def __init__(self, now: float, limits: MoveLimits | None = None) -> None:
        self._limits = limits or MoveLimits()
        self._moved_at = now
        self._target: tuple[PeerId, ...] | None = None
        self._since = now

    def should_move(
        self,
        now: float,
        *,
        current: float,
        better: float,
        target: tuple[PeerId, ...],
        tokens: int,
        replay: float,
    ) -> bool:
        """Whether to move now.

        ``current`` and ``better`` are the expected seconds of a token over the session's chain and over the
        one through ``target``; ``tokens`` is how many it has generated, ``replay`` the seconds that filling
        the new servers' caches would take. Call `moved` if the move succeeds.
        """
        saved = current - better
        pays = saved >= self._limits.gain * current and saved * tokens > replay
        if not pays:
            self._target = None
            return False
        if target != self._target:
            self._target, self._since = target, now
            return False
        return now - self._since >= self._limits.hold and now - self._moved_at >= self._limits.interval

    def moved(self, now: float) -> None:
        """The session has moved, by choice or after a failure."""
        self._moved_at = now
        self._target = None

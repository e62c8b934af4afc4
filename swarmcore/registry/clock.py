"""What time it is in the swarm, for a peer whose own clock may be wrong."""

from __future__ import annotations

from collections.abc import Callable


class SwarmClock:
    """Seconds since the epoch: by this machine's clock, or by that of a member whose word is taken.

    A plain object on two clocks: ``wall_clock`` may be wrong and may be set at any time, ``steady`` (that of
    the event loop) only ever goes on. Clocks agree that are ``tolerance`` seconds apart or less.
    """

    def __init__(
        self, wall_clock: Callable[[], float], steady: Callable[[], float], tolerance: float
    ) -> None:
        self._wall_clock = wall_clock
        self._steady = steady
        self._tolerance = tolerance
        self._base: float | None = None
        self._agreed: float | None = None

    def __call__(self) -> float:
        return self._wall_clock() if self._base is None else self._base + self._steady()

    def __repr__(self) -> str:
        return (
            "<SwarmClock own>"
            if self._base is None
            else f"<SwarmClock {how_far_off(self.own() - self())} the swarm's>"
        )

    @property
    def followed(self) -> bool:
        """Whether the time is that of a member."""
        return self._base is not None

    def own(self) -> float:
        """What this machine's clock shows."""
        return self._wall_clock()

    def differs(self, member_time: float) -> bool:
        """Whether a member's clock that shows ``member_time`` does not agree with this machine's."""
        return abs(self._wall_clock() - member_time) > self._tolerance

    def update(self, member_time: float) -> None:
        """A member's clock shows ``member_time``: go by this machine's while they agree.

        Where they no longer do because this machine's clock has jumped, take the member's word; one that is
        followed already only keeps it exact.
        """
        now = self._wall_clock() - self._steady()
        if not self.differs(member_time):
            self._base, self._agreed = None, now
        elif self._base is not None:
            if abs(self() - member_time) <= self._tolerance:
                self.follow(member_time)
        elif self._agreed is not None and abs(now - self._agreed) > self._tolerance:
            self.follow(member_time)

    def follow(self, member_time: float) -> None:
        """Take the word of a member whose clock shows ``member_time`` now."""
        self._base = member_time - self._steady()

    def release(self) -> None:
        """Go by this machine's clock again."""
        self._base = None


def how_far_off(seconds: float) -> str:
    """``"3 hours ahead of"``, ``"2 years behind"``: how a clock differs that is so many seconds ahead."""
    for unit, length in (
        ("year", 31_556_952),
        ("day", 86_400),
        ("hour", 3600),
        ("minute", 60),
        ("second", 1),
    ):
        if abs(seconds) >= 0.95 * length or unit == "second":
            break
    count = round(abs(seconds) / length)
    return f"{count} {unit}{'s' * (count != 1)} {'ahead of' if seconds > 0 else 'behind'}"

"""How many rows of prefill go into a batch, so that no batch takes long. A plain object.

Others' decode steps wait for the batch that runs, and a server that is slow shows that it gets on only by
batches that end. What a batch takes for a few rows it takes for many: the weights are read once. So it is not
rows that are reckoned with but whole batches, and the number is only ever halved or doubled.
"""

from __future__ import annotations

LONGEST = 1.0
"""Seconds that a batch should take at most."""

SHORTEST = 0.1
DECODES = 4.0
"""While others decode: so many batches of decode steps, but `SHORTEST` seconds at least."""

ACTIVE = 2.0
"""Seconds after a decode step in which others are taken to decode."""

FIRST = 16
"""Rows of the first batch."""

LEAST = 32
"""Rows for which others who decode wait, unless these take longer than `LONGEST`."""

MOST = 2**20


class PrefillPacing:
    """Follows how long batches take."""

    def __init__(self, first: int = FIRST) -> None:
        self._rows = first
        self._decoded_at = float("-inf")

    @property
    def rows(self) -> int:
        """Most rows of prefill in the next batch, 1 or more."""
        return self._rows

    def note_batch(
        self, rows: int, seconds: float, *, decodes: bool, decode_seconds: float, now: float
    ) -> None:
        """A batch with so many rows of prefill is through; whether it had decode steps as well.

        ``decode_seconds`` is what a batch of decode steps alone takes; 0 when that is not known.
        """
        if decodes:
            self._decoded_at = now
        if not rows:
            return
        target = LONGEST
        if now < self._decoded_at + ACTIVE:
            target = min(max(SHORTEST, DECODES * decode_seconds), LONGEST)
        if seconds > target:
            least = LEAST if seconds <= LONGEST else 1
            self._rows = max(min(self._rows, rows) // 2, min(least, self._rows))
        elif rows >= self._rows and seconds < target / 2:
            self._rows = min(2 * self._rows, MOST)

    def __repr__(self) -> str:
        return f"<PrefillPacing {self._rows} rows>"

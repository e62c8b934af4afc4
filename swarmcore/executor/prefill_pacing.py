"""How many rows of prefill go into a batch, so that no batch takes long. A plain object.

Others' decode steps wait for the batch that runs, and a server that is slow shows that it gets on only by
batches that end.
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
"""Rows of the first batch; later ones may have twice as many as any before them."""

SMOOTHING = 0.3
"""Weight of a batch that took less time for a row than expected; one that took more counts at once."""


class PrefillPacing:
    """Learns how long rows take."""

    def __init__(self, first: int = FIRST) -> None:
        self._tried = first / 2
        self._per_row = 0.0
        self._decoded_at = float("-inf")

    def rows(self, now: float, decode_seconds: float) -> int:
        """Most rows of prefill in the next batch, 1 or more.

        ``decode_seconds`` is what a batch of decode steps takes; 0 when that is not known.
        """
        target = LONGEST
        if now < self._decoded_at + ACTIVE:
            target = min(max(SHORTEST, DECODES * decode_seconds), LONGEST)
        rows = 2 * self._tried
        if self._per_row:
            rows = min(rows, target / self._per_row)
        return max(1, int(rows))

    def note_batch(self, rows: int, seconds: float, *, decodes: bool, prefills: bool, now: float) -> None:
        """A batch of ``rows`` is through; whether it had steps of either kind."""
        if decodes:
            self._decoded_at = now
        if prefills:
            took = seconds / rows
            self._per_row = max(took, self._per_row + SMOOTHING * (took - self._per_row))
            self._tried = max(self._tried, rows)

    def __repr__(self) -> str:
        return f"<PrefillPacing {1000 * self._per_row:.3g} ms a row · {self._tried:g} rows tried>"

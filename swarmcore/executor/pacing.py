"""How large the units of passes are, so that interactive steps hardly notice them. A plain object."""

from __future__ import annotations

from swarmcore.executor.pass_queue import Kind

SHARE = 0.5
"""What a unit should take, in batches of decode steps: one unit at most goes between two batches, so that a
step waits for one unit and its own batch, and some of them take longer than expected."""

LONGEST = 5.0
"""Seconds that a unit should take at most when nobody is interactive: only between two does it show that a
pass gets on."""

ACTIVE = 2.0
"""Seconds after its last step for which a session is taken to be about to send the next one."""

SMOOTHING = 0.1
"""Weight of a unit that took less time than expected; one that took more counts at once."""


class Pacing:
    """Learns how long units take. Times are in seconds."""

    def __init__(self) -> None:
        self._per_token: dict[Kind, float] = {}
        self._stepped_at: float | None = None

    def stepped(self, now: float) -> None:
        """A session has sent a step, or has got its result."""
        self._stepped_at = now

    def interactive(self, now: float) -> bool:
        """Whether somebody waits for steps, or was just now."""
        return self._stepped_at is not None and now < self._stepped_at + ACTIVE

    def unit_tokens(self, kind: Kind, lengths: tuple[int, ...], batch_seconds: float, now: float) -> int:
        """Most tokens of the next unit of a pass over sequences of ``lengths``.

        ``batch_seconds`` is what a batch of decode steps takes; 0 when that is not known.
        """
        per_token = self._per_token.get(kind)
        if not self.interactive(now):
            return max(1, min(sum(lengths), int(LONGEST / per_token))) if per_token else sum(lengths)
        if not per_token or not batch_seconds:
            return 1  # one sequence, to learn from
        return max(1, min(sum(lengths), int(SHARE * batch_seconds / per_token)))

    def note_unit(self, kind: Kind, lengths: tuple[int, ...], max_tokens: int, seconds: float) -> None:
        """A unit of ``max_tokens`` at most has taken so long."""
        mean = sum(lengths) / len(lengths)
        # Units are whole sequences; how many there were is not told, but the mean is near enough.
        tokens = mean * max(1, min(len(lengths), int(max_tokens / mean)))
        took, old = seconds / tokens, self._per_token.get(kind, 0.0)
        self._per_token[kind] = max(took, old + SMOOTHING * (took - old))

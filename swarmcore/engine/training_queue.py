"""Which pass computes its next unit, and how many may wait. A plain object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import attrs

from swarmcore.errors import SwarmError, TooManyCallsError
from swarmcore.executor.base import PassKind, TrainingPass
from swarmcore.types import Span


@attrs.define(eq=False, kw_only=True)
class QueuedPass:
    """A pass that has all it needs."""

    caller: str
    kind: PassKind
    span: Span
    lengths: tuple[int, ...]
    work: TrainingPass
    answer: asyncio.Future[None]
    """Done when the last unit is."""
    saves: bool = False
    """Whether it computes activations that have to be held."""
    nbytes: int = 0
    """Memory of activations that it holds, or that is set aside for them."""
    begun: bool = False
    running: bool = False
    """Whether a unit of it computes now."""
    abandoned: bool = False
    """Whether nobody waits for it any more."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def fail(self, error: SwarmError) -> None:
        """Answer with ``error``, unless there is an answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


class TrainingQueue:
    """Passes of many callers on one executor, a unit at a time.

    The caller that was given least of the executor's time goes next, with its oldest pass; one that comes
    anew starts level with the others, so that neither idle time nor earlier use counts. No more than
    ``max_under_way`` passes are begun at once. ``max_tokens`` bounds the rows of all passes that wait,
    receive or compute, and half of it those of one caller.
    """

    def __init__(self, *, max_under_way: int, max_tokens: int) -> None:
        self.max_under_way = max_under_way
        self.max_tokens = max_tokens
        self.admitted_tokens = 0
        """Rows of the passes that are admitted and not over."""
        self._by_caller: dict[str, int] = {}
        self._waiting: dict[str, dict[QueuedPass, None]] = {}
        self._spent: dict[str, float] = {}
        self._level = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def passes(self) -> list[QueuedPass]:
        """All that wait or compute."""
        return [each for queue in self._waiting.values() for each in queue]

    @property
    def under_way(self) -> int:
        """How many have begun."""
        return sum(each.begun for each in self.passes)

    # --- room --------------------------------------------------------------------------------------------

    def admit(self, caller: str, tokens: int) -> None:
        """Set room aside for a pass of ``tokens`` rows, until `leave`. Raise `TooManyCallsError`."""
        own = self._by_caller.get(caller, 0)
        if self.admitted_tokens + tokens > self.max_tokens:
            raise TooManyCallsError(
                f"{self.admitted_tokens} tokens of forward and backward passes wait here, and {tokens} more "
                f"are above the limit of {self.max_tokens}; try again later, or another server"
            )
        if own and own + tokens > self.max_tokens // 2:
            raise TooManyCallsError(
                f"{own} tokens of your forward and backward passes wait here, and {tokens} more are above "
                f"the limit of {self.max_tokens // 2} for one caller; await some before sending more"
            )
        self.admitted_tokens += tokens
        self._by_caller[caller] = own + tokens

    def leave(self, caller: str, tokens: int) -> None:
        """A pass of ``tokens`` rows that was admitted is over."""
        self.admitted_tokens -= tokens
        self._by_caller[caller] -= tokens
        if not self._by_caller[caller]:
            del self._by_caller[caller]

    # --- turns -------------------------------------------------------------------------------------------

    def add(self, queued: QueuedPass) -> None:
        """It may compute from now on."""
        queue = self._waiting.setdefault(queued.caller, {})
        if not queue:
            self._spent[queued.caller] = max(self._spent.get(queued.caller, 0.0), self._level)
        queue[queued] = None

    def remove(self, queued: QueuedPass) -> None:
        """Forget it; harmless when it is not there."""
        queue = self._waiting.get(queued.caller, {})
        queue.pop(queued, None)
        if not queue:
            self._waiting.pop(queued.caller, None)

    def next(self, fits: Callable[[QueuedPass], bool] = lambda each: True) -> QueuedPass | None:
        """Whose unit is to be computed now.

        A pass whose turn it is to begin and that does not fit waits until others are through; none begins
        before it.
        """
        chosen = self._chosen(full=self.under_way >= self.max_under_way)
        if chosen is not None and not chosen.begun and not fits(chosen):
            chosen = self._chosen(full=True)
        if chosen is None:
            return None
        self._level = max(self._level, self._spent[chosen.caller])
        for caller in [c for c, spent in self._spent.items() if spent <= self._level]:
            if caller not in self._waiting:
                del self._spent[caller]
        return chosen

    def _chosen(self, *, full: bool) -> QueuedPass | None:
        heads = [
            head
            for queue in self._waiting.values()
            if (head := next((each for each in queue if each.begun or not full), None)) is not None
        ]
        return min(heads, key=lambda head: self._spent[head.caller], default=None)

    def charge(self, queued: QueuedPass, seconds: float) -> None:
        """Count the seconds that a unit of the pass has taken."""
        if queued.caller in self._spent:
            self._spent[queued.caller] += seconds

    def __repr__(self) -> str:
        return (
            f"<TrainingQueue {len(self)} passes of {len(self._waiting)} callers · {self.under_way} begun · "
            f"{self.admitted_tokens}/{self.max_tokens} tokens>"
        )


SHARE = 0.5
"""What a unit should take, in batches of decode steps: one unit at most goes between two batches, so that a
step waits for one unit and its own batch, and some of them take longer than expected."""

LONGEST = 5.0
"""Seconds that a unit should take at most when nobody is interactive: progress shows only between two."""

ACTIVE = 2.0
"""Seconds after its last step for which a session is taken to be about to send the next one."""

SMOOTHING = 0.1
"""Weight of a unit that took less time than expected; one that took more counts at once."""


class TrainingPacing:
    """Learns how long units take. Times are in seconds."""

    def __init__(self) -> None:
        self._per_token: dict[PassKind, float] = {}
        self._stepped_at: float | None = None

    def stepped(self, now: float) -> None:
        """A session has sent a step, or has got its result."""
        self._stepped_at = now

    def interactive(self, now: float) -> bool:
        """Whether somebody waits for steps, or was just now."""
        return self._stepped_at is not None and now < self._stepped_at + ACTIVE

    def unit_tokens(self, kind: PassKind, lengths: tuple[int, ...], batch_seconds: float, now: float) -> int:
        """Most tokens of the next unit of a pass over sequences of ``lengths``.

        ``batch_seconds`` is what a batch of decode steps takes; 0 when that is not known.
        """
        per_token = self._per_token.get(kind)
        if not self.interactive(now):
            return max(1, min(sum(lengths), int(LONGEST / per_token))) if per_token else sum(lengths)
        if not per_token or not batch_seconds:
            return 1  # one sequence, to learn from
        return max(1, min(sum(lengths), int(SHARE * batch_seconds / per_token)))

    def note_unit(self, kind: PassKind, lengths: tuple[int, ...], max_tokens: int, seconds: float) -> None:
        """A unit of ``max_tokens`` at most has taken so long."""
        mean = sum(lengths) / len(lengths)
        # Units are whole sequences; how many there were is not known, but the mean is near enough.
        tokens = mean * max(1, min(len(lengths), int(max_tokens / mean)))
        took, old = seconds / tokens, self._per_token.get(kind, 0.0)
        self._per_token[kind] = max(took, old + SMOOTHING * (took - old))

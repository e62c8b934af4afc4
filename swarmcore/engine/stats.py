"""What an engine has done since it started, and how fast."""

from __future__ import annotations

import math

import attrs

from swarmcore.executor.base import PassKind

SMOOTHING = 0.1
"""Weight of the newest batch in the running averages."""

QUEUE_MEMORY = 30.0
"""Seconds in which the average wait of decode steps fades to a third when no more of them come."""


@attrs.define
class EngineStats:
    """Counts since start; rates are running averages over the last batches."""

    steps: int = 0
    tokens: int = 0
    batches: int = 0
    steps_failed: int = 0
    """Steps that were accepted and then failed, expired or were cancelled."""
    refusals: int = 0
    """Sessions and steps that were not accepted, or found no room in the cache."""
    sessions_opened: int = 0
    sessions_evicted: int = 0
    """Sessions ended for being idle, or to make room."""
    forwards: int = 0
    """Forward passes that were computed to the end; the same for those below."""
    backwards: int = 0
    pass_tokens: int = 0
    pass_units: int = 0
    pass_seconds: float = 0.0
    """Time at work on passes, of those that failed too."""
    passes_failed: int = 0
    """Passes that were accepted and then failed, expired or were cancelled."""
    passes_refused: int = 0
    kept_hits: int = 0
    """Backward passes that found their activations kept."""
    kept_misses: int = 0
    decode_rps: float = 0.0
    """Decode steps per second that one session would see: one over the time of a batch of decode steps."""
    forward_rps: float = 0.0
    """Tokens per second of batches that hold prefill."""
    queue_seconds: float = 0.0
    """Seconds that a decode step waits until its first batch starts; see `queue_seconds_at`."""
    _waited_at: float = attrs.field(default=0.0, repr=False)

    @property
    def mean_batch(self) -> float:
        """Tokens in a batch, on average."""
        return self.tokens / self.batches if self.batches else 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds that a batch of decode steps takes; 0 until one has been measured."""
        return 1 / self.decode_rps if self.decode_rps else 0.0

    def note_batch(self, tokens: int, seconds: float, decode_only: bool) -> None:
        self.batches += 1
        self.tokens += tokens
        if seconds <= 0:
            return
        if decode_only:
            self.decode_rps = _average(self.decode_rps, 1 / seconds)
        else:
            self.forward_rps = _average(self.forward_rps, tokens / seconds)

    def note_unit(self, seconds: float) -> None:
        """A unit of a pass was computed."""
        self.pass_units += 1
        self.pass_seconds += seconds

    def note_pass(self, kind: PassKind, tokens: int) -> None:
        """A pass is through."""
        self.pass_tokens += tokens
        if kind == "forward":
            self.forwards += 1
        else:
            self.backwards += 1

    def note_wait(self, seconds: float, now: float) -> None:
        """A decode step was submitted so many seconds before its first batch, which starts ``now``."""
        self.queue_seconds = self.queue_seconds_at(now)
        self.queue_seconds += SMOOTHING * (seconds - self.queue_seconds)
        self._waited_at = now

    def queue_seconds_at(self, now: float) -> float:
        """`queue_seconds`, fading since the last step: a queue that keeps everyone away is soon gone."""
        return self.queue_seconds * math.exp((self._waited_at - now) / QUEUE_MEMORY)

    def counters(self) -> dict[str, float]:
        """Everything by name, for `InfoReply` and metrics."""
        counts = attrs.asdict(self, filter=lambda field, value: not field.name.startswith("_"))
        return {**counts, "mean_batch": self.mean_batch}


def _average(old: float, new: float) -> float:
    # Harmonic, since what is averaged is really the time that each batch took.
    return 1 / ((1 - SMOOTHING) / old + SMOOTHING / new) if old else new

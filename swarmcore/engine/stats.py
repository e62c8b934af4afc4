"""What an engine has done since it started, and how fast."""

from __future__ import annotations

import math

import attrs

from swarmcore.executor.base import PassKind

SMOOTHING = 0.1
"""Weight of the newest batch in the running averages."""

QUEUE_MEMORY = 30.0
"""Seconds in which the average wait of decode steps fades to a third when no more of them come."""


RECENT = 15.0
"""Seconds after which what batches did counts a third of what it did."""


@attrs.define
class _Recent:
    """What batches did of late: sums that fade."""

    batches: float = 0.0
    tokens: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    _at: float = 0.0

    def add(
        self, now: float, *, batches: float = 0.0, tokens: float = 0.0, busy: float = 0.0, waited: float = 0.0
    ) -> None:
        left = math.exp((self._at - now) / RECENT)
        self._at = now
        self.batches = left * self.batches + batches
        self.tokens = left * self.tokens + tokens
        self.busy = left * self.busy + busy
        self.waited = left * self.waited + waited


@attrs.define
class EngineStats:
    """Counts since start; rates are running averages over the last batches."""

    steps: int = 0
    tokens: int = 0
    batches: int = 0
    batch_seconds: float = 0.0
    """Time at work on batches."""
    decode_batches: int = 0
    """Batches of decode steps alone."""
    decode_tokens: int = 0
    """Tokens in these."""
    batch_waits: int = 0
    """Batches of decode steps that waited for more of them."""
    batch_waits_in_vain: int = 0
    """Those of them for which none came."""
    batch_wait_seconds: float = 0.0
    """Time that they waited, together."""
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
    _recent: _Recent = attrs.field(factory=_Recent, repr=False)

    @property
    def mean_batch(self) -> float:
        """Tokens in a batch, on average."""
        return self.tokens / self.batches if self.batches else 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds that a batch of decode steps takes; 0 until one has been measured."""
        return 1 / self.decode_rps if self.decode_rps else 0.0

    def note_batch(self, tokens: int, seconds: float, decode_only: bool, now: float) -> None:
        """A batch is through; whether it was one of decode steps alone."""
        self.batches += 1
        self.tokens += tokens
        self.batch_seconds += seconds
        if decode_only:
            self.decode_batches += 1
            self.decode_tokens += tokens
        self._recent.add(now, batches=1.0, tokens=tokens, busy=seconds)
        if seconds <= 0:
            return
        if decode_only:
            self.decode_rps = _average(self.decode_rps, 1 / seconds)
        else:
            self.forward_rps = _average(self.forward_rps, tokens / seconds)

    def note_window(self, seconds: float, more_came: bool, now: float) -> None:
        """A batch of decode steps waited so long for more of them."""
        self._recent.add(now, waited=seconds)
        self.batch_waits += 1
        self.batch_waits_in_vain += not more_came
        self.batch_wait_seconds += seconds

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

    def recent(self, now: float) -> str:
        """How batches have been of late, in words; empty when there were next to none."""
        recent = self._recent
        recent.add(now)
        if recent.batches < 0.5:
            return ""
        batches, size = recent.batches / RECENT, recent.tokens / recent.batches
        busy, waited = 100 * recent.busy / RECENT, 100 * recent.waited / RECENT
        return (
            f"{batches:.1f} batches/s of {size:.1f} tokens: {busy:.0f} % of the time at work, {waited:.0f} % "
            f"waiting for more steps"
        )

    def counters(self) -> dict[str, float]:
        """Everything by name, for `InfoReply` and metrics."""
        counts = attrs.asdict(self, filter=lambda field, value: not field.name.startswith("_"))
        return {**counts, "mean_batch": self.mean_batch}


def _average(old: float, new: float) -> float:
    # Harmonic, since what is averaged is really the time that each batch took.
    return 1 / ((1 - SMOOTHING) / old + SMOOTHING / new) if old else new

"""Memory for activations: of passes that compute, and of forward passes that backward passes may follow.

A plain object.
"""

from __future__ import annotations

import math

import attrs

from swarmcore.executor.base import Adapter, ForwardPass, TrainingBatch, TrainingPass
from swarmcore.types import Span


@attrs.define(eq=False)
class _Kept:
    forward: ForwardPass
    key: tuple[Span, tuple[int, ...], bool, bool]
    adapter: Adapter | None
    nbytes: int
    until: float


class ActivationStore:
    """At most ``budget`` bytes, each pass for ``ttl`` seconds; the oldest go first, and before passes that
    compute and need the room.

    A kept pass goes to the first backward pass that names it. Callers see speed and nothing else: what is
    gone is computed again. A caller's passes are not dropped when its connections end: they belong to none of
    them, and are soon gone by themselves.
    """

    def __init__(self, budget: int, *, ttl: float = 120.0) -> None:
        self.budget = budget
        self.ttl = ttl
        self.nbytes = 0
        """What is kept now."""
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._token_bytes = 0.0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def known(self) -> bool:
        """Whether any pass has shown yet what activations take."""
        return self._token_bytes > 0

    def learn(self, work: TrainingPass) -> None:
        """What activations take, as a pass has shown."""
        self._token_bytes = work.token_bytes or self._token_bytes

    def estimate(self, tokens: int, span: Span) -> int:
        """Bytes of the activations of so many tokens in ``span``, as far as earlier ones tell."""
        return math.ceil(self._token_bytes * tokens * len(span))

    def tokens_within(self, nbytes: int, span: Span) -> int:
        """How many tokens' activations fit; 1 as long as nothing is known."""
        return max(1, int(nbytes / (self._token_bytes * len(span)))) if self.known else 1

    def make_room(self, nbytes: int) -> None:
        """Drop what is kept, the oldest first, until it fits beside ``nbytes`` of others."""
        while self._kept and self.nbytes + nbytes > self.budget:
            self._drop(next(iter(self._kept)))

    def worth_keeping(self, batch: TrainingBatch) -> bool:
        """Whether a batch's activations would fit at all, as far as earlier ones tell."""
        return self.budget > 0 and self.estimate(batch.tokens, batch.span) <= self.budget

    def keep(
        self,
        caller: str,
        name: str,
        batch: TrainingBatch,
        forward: ForwardPass,
        now: float,
        *,
        under_way: int = 0,
    ) -> bool:
        """Take over a pass that is through, or close it and return False when it does not fit.

        Passes that are ``under_way`` take so many bytes. A name that the caller has used before is forgotten.
        """
        self._drop((caller, name))
        nbytes = forward.kept_bytes
        if nbytes + under_way > self.budget:
            forward.close()
            return False
        self.make_room(nbytes + under_way)
        self._kept[caller, name] = _Kept(forward, _key(batch), batch.adapter, nbytes, now + self.ttl)
        self.nbytes += nbytes
        return True

    def take(self, caller: str, name: str, batch: TrainingBatch, now: float) -> ForwardPass | None:
        """Hand out the pass kept under ``name``, for the caller to close; None when none of ``batch`` is.

        The batch's rows are not looked at.
        """
        self.expire(now)
        kept = self._kept.get((caller, name))
        if kept is None or kept.key != _key(batch) or kept.adapter is not batch.adapter:
            return None
        del self._kept[caller, name]
        self.nbytes -= kept.nbytes
        return kept.forward

    def expire(self, now: float) -> None:
        """Drop what has been kept for long enough."""
        for name in [name for name, kept in self._kept.items() if kept.until <= now]:
            self._drop(name)

    def next_expiry(self) -> float | None:
        """When `expire` is due."""
        return min((kept.until for kept in self._kept.values()), default=None)

    def clear(self, keep: Span | None = None) -> None:
        """Drop everything, or what is not of blocks in ``keep``."""
        for name, kept in list(self._kept.items()):
            span = kept.key[0]
            if keep is None or not keep.covers(span):
                self._drop(name)

    def _drop(self, name: tuple[str, str]) -> None:
        if (kept := self._kept.pop(name, None)) is not None:
            self.nbytes -= kept.nbytes
            kept.forward.close()

    def __repr__(self) -> str:
        return f"<ActivationStore {len(self)} passes · {self.nbytes}/{self.budget} bytes>"


def _key(batch: TrainingBatch) -> tuple[Span, tuple[int, ...], bool, bool]:
    return batch.span, batch.lengths, batch.reproducible, batch.padding

"""How often something may be done, and how long to wait before it is done again. Plain objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from random import Random
from typing import Generic, TypeVar

import attrs

K = TypeVar("K", bound=Hashable)


def jittered(seconds: float, rng: Random, spread: float = 0.25) -> float:
    """``seconds``, more or less by up to ``spread`` of them, so that many peers do not act all at once."""
    return seconds * rng.uniform(1 - spread, 1 + spread)


@attrs.define
class Backoff:
    """Pauses between attempts: ``first``, twice as long after each further failure, up to ``longest``."""

    first: float
    longest: float
    failures: int = attrs.field(default=0, init=False)
    """Failures since the last `reset`."""
    until: float = attrs.field(default=float("-inf"), init=False)
    """When the next attempt is due, after `failed`."""

    def next(self, rng: Random | None = None) -> float:
        """Seconds to wait after one more failure, `jittered` where ``rng`` is given."""
        pause = min(self.first * 2 ** min(self.failures, 64), self.longest)
        self.failures += 1
        return pause if rng is None else jittered(pause, rng)

    def failed(self, now: float, rng: Random | None = None) -> float:
        """As `next`, for one who does something else meanwhile: the next attempt is due at `until`."""
        pause = self.next(rng)
        self.until = now + pause
        return pause

    def reset(self) -> None:
        """An attempt has succeeded."""
        self.failures = 0


@attrs.define
class TokenBucket:
    """A bucket of ``burst`` tokens that fills at ``rate`` a second; ``now`` is passed in."""

    rate: float
    burst: float
    _tokens: float = attrs.field(init=False)
    _filled_at: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = self.burst

    def take(self, now: float) -> bool:
        """Take one token. False when there is none."""
        self._tokens = min(self.burst, self._tokens + (now - self._filled_at) * self.rate)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class TokenBuckets(Generic[K]):
    """A `TokenBucket` for each key; of more than ``most`` keys, those that were used last are remembered."""

    def __init__(self, rate: float, burst: float, *, most: int = 4096) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._buckets: OrderedDict[K, TokenBucket] = OrderedDict()

    def take(self, key: K, now: float) -> bool:
        """Take one token of the bucket of ``key``. False when there is none."""
        bucket = self._buckets.pop(key, None) or TokenBucket(self._rate, self._burst)
        self._buckets[key] = bucket
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return bucket.take(now)

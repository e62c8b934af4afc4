"""How long each peer usually takes to answer, so that its silence is judged by its own measure."""

from __future__ import annotations

from collections import OrderedDict

from swarmcore.types import PeerId

LEAST = 0.4
"""Seconds below which no answer is called late: a garbage collection or a busy core takes as long."""

UNKNOWN = 1.0
"""What a peer is allowed that has never been measured."""

MOST = 3.0
"""Seconds above which any answer is late."""


class ResponseTime:
    """One peer's usual time to answer a small call, estimated as TCP does (RFC 6298). A plain object."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0
        self._backoff = 1.0

    def measured(self, seconds: float) -> None:
        """An answer took so long, a late one too."""
        self._backoff = 1.0
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8

    def missed(self) -> None:
        """No answer came in time: allow twice as much, until one has."""
        self._backoff = min(2 * self._backoff, MOST / LEAST)

    @property
    def known(self) -> bool:
        """Whether it has ever been measured."""
        return self._mean is not None

    @property
    def mean(self) -> float:
        """Seconds that an answer takes on average, `MOST` at most; 0 when that is not known."""
        return min(self._mean or 0.0, MOST)

    @property
    def timeout(self) -> float:
        """Seconds after which an answer is late."""
        usual = UNKNOWN if self._mean is None else self._mean + 4 * self._deviation
        return min(max(usual, LEAST) * self._backoff, MOST)

    def __repr__(self) -> str:
        usual = "unknown" if self._mean is None else f"{1000 * self._mean:.0f} ms"
        return f"<ResponseTime {usual} · late after {self.timeout:.2f} s>"


class ResponseTimes:
    """Those of the ``capacity`` peers that were asked for last."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._of: OrderedDict[PeerId, ResponseTime] = OrderedDict()

    def of(self, peer: PeerId) -> ResponseTime:
        found = self._of.setdefault(peer, ResponseTime())
        self._of.move_to_end(peer)
        if len(self._of) > self._capacity:
            self._of.popitem(last=False)
        return found

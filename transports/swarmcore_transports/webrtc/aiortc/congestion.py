"""How much a sender may have in flight, and how fast it may leave: CUBIC (RFC 9438) with pacing.

In place of RFC 9260, 7.2, which is TCP's Reno of 1988: on a path of 100 ms it takes minutes to win back a
window that one lost packet has halved. CUBIC grows with the time since the loss, whatever the round trip
(https://www.rfc-editor.org/rfc/rfc9438). Pacing spreads a window over the round trip: sent in one burst it
overflows the queue of the slowest link on the way, and is lost where a smooth flow would have fitted.
"""

from __future__ import annotations

import attrs

INITIAL_PACKETS = 16
"""Of the first flight: as many bytes as some 13 packets of TCP, which starts with 10 (RFC 6928)."""

_MIN_PACKETS = 4
_SEGMENT = 1460
"""Bytes by which the window grows where TCP's grows by a segment, for an equal share with smaller packets."""
_BETA = 0.7  # RFC 9438, 4.6: what is left of the window after a loss
_CUBIC = 0.4  # RFC 9438, 4.1.1: the constant C
_RENO_FRIENDLY = 3 * (1 - _BETA) / (1 + _BETA)
_IDLE_HALF_LIFE = 5.0
"""Seconds of silence in which what is known of a path loses half of its worth (RFC 2861 takes a timeout)."""


@attrs.define
class CongestionWindow:
    """Sizes are in bytes of user data, times in seconds of the caller's clock."""

    packet: int
    """The most that one packet carries."""
    size: int = attrs.field(init=False)
    """What may be in flight."""
    _threshold: float = attrs.field(init=False, default=float("inf"))
    _cut_at: float = attrs.field(init=False, default=float("-inf"))
    _filled_at: float = attrs.field(init=False, default=float("-inf"))
    _size_before_cut: float = attrs.field(init=False, default=0.0)
    _avoiding: float = attrs.field(init=False, default=0.0)
    _reno_size: float = attrs.field(init=False, default=0.0)
    _last_ack: float = attrs.field(init=False, default=float("-inf"))
    _budget: float = attrs.field(init=False)
    _budget_at: float = attrs.field(init=False, default=float("-inf"))

    def __attrs_post_init__(self) -> None:
        self.size = INITIAL_PACKETS * self.packet
        self._budget = float(self.size)

    def sent(self, count: int, flight: int, now: float) -> None:
        """``count`` bytes left, and ``flight`` are in flight with them."""
        self._budget -= count
        if 2 * flight > self.size:
            self._filled_at = now

    def acknowledged(self, count: int, sent_at: float, rtt: float, now: float) -> None:
        """``count`` bytes arrived, the latest of which left at ``sent_at``.

        The window grows only where half of it was used, and not by what left before it was last cut.
        """
        # The cubic curve runs on time in which the sender was limited by the window, not by its program: a
        # pause must not let it leap (RFC 9438, 5.8).
        elapsed, self._last_ack = min(now - self._last_ack, rtt), now
        if sent_at < self._cut_at or sent_at > self._filled_at:
            return
        if self.size < self._threshold:
            self.size += min(count, INITIAL_PACKETS * self.packet)
            return
        self._avoiding += elapsed
        self._reno_size += _RENO_FRIENDLY * _SEGMENT * count / self.size
        # RFC 9438, 4.2: K, the seconds until the window is as large as when it was cut; then the curve, for a
        # round trip ahead, and never below what Reno would have by now (4.3).
        until_regained = (self._size_before_cut / _SEGMENT * (1 - _BETA) / _CUBIC) ** (1 / 3)
        cubic = self._size_before_cut + _CUBIC * (self._avoiding + rtt - until_regained) ** 3 * _SEGMENT
        step = (min(cubic, 1.5 * self.size) - self.size) * count / self.size
        self.size = int(max(self.size + step, self.size, self._reno_size))

    def lost(self, sent_at: float, now: float) -> None:
        """Something that left at ``sent_at`` did not arrive. Once a round trip, this cuts the window."""
        if sent_at >= self._cut_at:
            self._cut(now)
            self.size = int(self._threshold)

    def timed_out(self, now: float) -> None:
        """Nothing arrives any more: begin anew with one packet."""
        self._cut(now)
        self.size = self.packet

    def _cut(self, now: float) -> None:
        self._cut_at = now
        self._size_before_cut = self.size
        self._threshold = self._reno_size = max(_BETA * self.size, _MIN_PACKETS * self.packet)
        self._avoiding = 0.0

    def resumed(self, idle: float) -> None:
        """Nothing was in flight for ``idle`` seconds, in which what is known of the path grew old."""
        initial = INITIAL_PACKETS * self.packet
        if idle >= _IDLE_HALF_LIFE and self.size > initial:
            self._threshold = max(self._threshold, 0.75 * self.size)
            self.size = max(initial, int(self.size * 0.5 ** (idle // _IDLE_HALF_LIFE)))

    def delay(self, rtt: float | None, now: float) -> float:
        """Seconds until the next packet may leave: none in a burst, then a share of ``rtt``."""
        burst = min(self.size, INITIAL_PACKETS * self.packet)
        if rtt is None:
            return 0.0
        rate = (2.0 if self.size < self._threshold else 1.25) * self.size / max(rtt, 1e-3)
        self._budget = min(burst, self._budget + (now - self._budget_at) * rate)
        self._budget_at = now
        return 0.0 if self._budget > 0 else (_MIN_PACKETS * self.packet - self._budget) / rate

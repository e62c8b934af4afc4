"""Flow control by credit: a receiver grants bytes, a sender spends them.

Both sides always read their socket, so that heartbeats, aborts and credits pass a stream whose application
does not read. What bounds memory is that a sender waits when its credit is spent.
"""

from __future__ import annotations

from collections import deque

from swarmcore.errors import ProtocolError

MESSAGE_COST = 256
"""Credit a message costs on top of its bytes, so that a flood of empty ones is bounded too."""

MIN_WINDOW = 16 * 1024


def window_for(send_buffer: int) -> int:
    """The credit a receiver grants at first."""
    return min(max(send_buffer, MIN_WINDOW), 2**31)


class Inbox:
    """Messages that have come and were not taken yet, and the credit to hand back for those that were.

    A message that nothing waits in front of gives its credit back while it arrives, so one message may be
    larger than the window. Held at any time: that one message and a window's worth behind it.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._charged = 0  # spent by the sender and not granted again
        self._held = 0  # the part of it that waits for the application
        self._arriving = 0  # the part of it that belongs to the message now arriving
        self._messages: deque[tuple[memoryview, int]] = deque()
        self._discarding = False

    def __len__(self) -> int:
        return len(self._messages)

    def announce(self, length: int, *, first: bool) -> None:
        """Charge the sender for a part. Raise `ProtocolError` when it spends more than it was granted."""
        cost = length + (MESSAGE_COST if first else 0)
        self._charged += cost
        if self._charged > self._window:
            raise ProtocolError("the peer sends more than it was granted")
        if self._messages:
            self._arriving += cost
            self._held += cost

    def put(self, message: memoryview) -> None:
        if not self._discarding:
            self._messages.append((message, self._arriving))
        self._arriving = 0

    def take(self) -> memoryview:
        message, cost = self._messages.popleft()
        self._held -= cost
        if not self._messages:
            self._held -= self._arriving
            self._arriving = 0
        return message

    def discard(self) -> None:
        """Drop what is here and what still comes."""
        self._discarding = True
        self._messages.clear()
        self._held = self._arriving = 0

    def grant(self) -> int:
        """The credit to hand back now: 0 until a quarter of the window is due, to save frames."""
        due = self._charged - self._held
        if due < self._window // 4:
            return 0
        self._charged -= due
        return due

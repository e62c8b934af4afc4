"""Flow control by credit: a receiver grants bytes, a sender spends them.

Both sides always read their socket, so that heartbeats, aborts and credits pass a stream whose application
does not read. What bounds memory is that a sender waits when its credit is spent, and that nothing is granted
for which this process has no memory. A window that bounded the messages themselves would have to be as large
as the largest of them, for every stream; so a long message is let in by itself, once there is memory for all
of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from swarmcore.errors import ProtocolError
from swarmcore.resources import Priority, Reservation, Resource, ResourceManager
from swarmcore.types import PeerId

MESSAGE_COST = 256
"""Credit a message costs on top of its bytes, so that a flood of empty ones is bounded too."""

MIN_WINDOW = 16 * 1024

FIRST_WINDOW = 128 * 1024
"""Most credit that a stream has from its beginning; one that makes use of it gets more, as far as there is
memory."""

STALL_SECONDS = 30.0
"""Seconds in which a message under way must bring `MIN_PROGRESS` bytes, or come to its end."""

MIN_PROGRESS = 16 * 1024

MIN_PROGRESS_UNDER_PRESSURE = 2 * 2**20
"""The same while others wait for memory: then the slowest go."""


def window_for(send_buffer: int) -> int:
    """The most credit that a receiver grants at a time."""
    return min(max(send_buffer, MIN_WINDOW), 2**31)


class ReceiveQueue:
    """Messages that have come and were not taken yet, and the credit to hand back for those that were.

    Held at any time: ``window`` bytes, and besides them one message that was admitted. A message is admitted
    once nothing waits in front of it and there is memory for all of it; it then gives its credit back while
    it arrives, so that it may be larger than the window.
    """

    def __init__(self, window: int, max_window: int | None = None) -> None:
        self._window = window
        self._max_window = window if max_window is None else max_window
        self._owed = 0  # by which the window has grown and that was not granted yet
        self._charged = 0  # spent by the sender and not granted again
        self._held = 0  # the part of it that waits for the application
        self._arriving = 0  # the part of that which belongs to the message now arriving
        self._total = 0  # bytes of the message now arriving; 0 when there is none
        self._admitted = False
        self._messages: deque[tuple[memoryview, int]] = deque()
        self._discarding = False

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def sender_can_continue(self) -> bool:
        """Whether it has credit for the message that arrives: if not, it waits for this side."""
        return self._admitted or (not self._messages and 4 * self._total < self._window)

    @property
    def window_growth(self) -> int:
        """Bytes by which the window should grow: more than half of it is in use, or will be."""
        if self._discarding or 2 * max(self._charged, self._total) <= self._window:
            return 0
        return self._max_window - self._window

    @property
    def to_admit(self) -> int:
        """The length of the message that arrives, if it should be admitted and is not."""
        if self._messages or self._admitted or self._discarding or 4 * self._total < self._window:
            return 0  # a short one is soon here
        return self._total

    def charge(self, length: int, *, total: int | None = None) -> None:
        """Charge the sender for a part, the first one of a message of ``total`` bytes, or a later one.

        Raise `ProtocolError` when it spends more than it was granted.
        """
        cost = length
        if total is not None:
            self._total = total
            cost += MESSAGE_COST
        if self._charged + cost > self._window:
            raise ProtocolError("the peer sends more than it was granted")
        self._charged += cost
        if not (self._admitted or self._discarding):
            self._arriving += cost
            self._held += cost

    def widen(self, more: int) -> None:
        """There is memory for so much more."""
        self._window += more
        self._owed += more

    def admit(self) -> None:
        """There is memory for all of the message that arrives."""
        self._admitted = True
        self._held -= self._arriving
        self._arriving = 0

    def put(self, message: memoryview) -> None:
        if not self._discarding:
            self._messages.append((message, self._arriving))
        self._arriving = self._total = 0
        self._admitted = False

    def take(self) -> memoryview:
        message, cost = self._messages.popleft()
        self._held -= cost
        return message

    def discard(self) -> None:
        """Drop what is here and what still comes."""
        self._discarding = True
        self._messages.clear()
        self._held = self._arriving = 0

    def grant(self) -> int:
        """The credit to hand back now: 0 until a quarter of the window is due, to save frames."""
        due = self._charged - self._held
        if not self._owed and due < self._window // 4:
            return 0
        self._charged -= due
        owed, self._owed = self._owed, 0
        return due + owed


class ReceiveMemory:
    """The memory that one stream's unread messages take, reserved before its sender is granted credit for it.

    The first window is reserved here, or `ResourceLimitError` raised. Wider windows have the lowest priority:
    without one a stream is slower, and works. Whole messages wait for memory in turn, of which windows leave
    enough; ``on_admitted`` is called when the one that arrives has got it.
    """

    def __init__(
        self,
        resources: ResourceManager,
        peer: PeerId,
        window: int,
        queue: ReceiveQueue,
        on_admitted: Callable[[], object],
    ) -> None:
        self._resources = resources
        self._peer = peer
        self._queue = queue
        self._on_admitted = on_admitted
        self._window = resources.reserve(peer, Resource.BYTES, window)
        self._message: Reservation | None = None  # for the message in front of all, if it was admitted
        self._taken: Reservation | None = None  # for the one taken last, until the next is asked for
        self._stop_waiting: Callable[[], None] | None = None

    def reserve(self) -> None:
        """Reserve what the queue could use now. Raise `ResourceLimitError` for a message that never fits."""
        more = self._queue.window_growth
        if more and self._resources.fits(self._peer, Resource.BYTES, more, Priority.LOW):
            self._window.resize(self._window.amount + more, Priority.LOW)
            self._queue.widen(more)
        if self._stop_waiting is None and (size := self._queue.to_admit):
            self._stop_waiting = self._resources.when_free(
                self._peer, Resource.BYTES, size, self._admit, priority=Priority.MEDIUM
            )

    def _admit(self, reservation: Reservation) -> None:
        self._message = reservation
        self._queue.admit()
        self._on_admitted()

    def message_arrived(self) -> None:
        """It is whole: from here on it needs no more memory."""
        if self._stop_waiting is not None:
            self._stop_waiting()
            self._stop_waiting = None

    def message_taken(self) -> None:
        """The application has the message in front of all."""
        self._taken, self._message = self._message, None

    def release_taken(self) -> None:
        """The application is through with what it took last, as it asks for the next."""
        if self._taken is not None:
            self._taken.release()
            self._taken = None

    def release(self) -> None:
        """The stream is over."""
        self.message_arrived()
        self.release_taken()
        if self._message is not None:
            self._message.release()
            self._message = None
        self._window.release()
        self._on_admitted = _nothing  # holds the stream, which holds this


def _nothing() -> None:
    pass


class StallDetector:
    """Whether a message under way still comes."""

    def __init__(self) -> None:
        self._message = 0
        self._got = 0
        self._since = 0.0

    def stalled(self, now: float, message: int, got: int, *, due: bool, under_pressure: bool) -> bool:
        """Whether ``message``, the number of the one under way, comes too slowly; ``got`` bytes are here.

        Only time in which the sender could go on counts: ``due``. ``under_pressure``: others wait for memory.
        """
        least = MIN_PROGRESS_UNDER_PRESSURE if under_pressure else MIN_PROGRESS
        if message != self._message or got >= self._got + least or not due:
            self._message, self._got, self._since = message, got, now
            return False
        return now - self._since > STALL_SECONDS

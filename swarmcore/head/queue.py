"""Whose text a generation server makes next, and how many may wait. A plain object."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import attrs

from swarmcore.errors import BusyError, InputError
from swarmcore.types import PeerId

FIRST_GUESS = 10.0
"""Seconds that a text is taken to last before any has ended."""


@attrs.define(eq=False)
class QueuedText:
    """One text, from its request to its end."""

    peer: PeerId
    may_begin: asyncio.Event = attrs.field(factory=asyncio.Event)
    """Set when it may begin."""


class GenerationQueue:
    """Texts of many peers, ``at_once`` of them made at a time, ``waiting`` more of them queued.

    The peer that has the fewest under way goes next, with its oldest request. Where there is more than one
    place, a peer has all but one of them at most, and half of the line: another one always gets in.
    """

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self.at_once = at_once
        self.waiting = waiting
        self._running: dict[QueuedText, None] = {}
        self._line: dict[QueuedText, None] = {}
        self._under_way: Counter[PeerId] = Counter()
        self._seconds = FIRST_GUESS

    def __repr__(self) -> str:
        return (
            f"<GenerationQueue {len(self._running)} of {self.at_once} under way, {len(self._line)} waiting>"
        )

    @property
    def under_way(self) -> int:
        """Texts that are being made."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Texts that wait for their turn."""
        return len(self._line)

    @property
    def retry_after(self) -> float:
        """Seconds after which one more text would have its turn, going by how long texts took of late."""
        return self._seconds * (len(self._line) + 1) / self.at_once

    def enter(self, peer: PeerId) -> QueuedText:
        """Queue for a text; `leave` has to follow. Raise `BusyError` when the queue is full."""
        text = QueuedText(peer)
        self._line[text] = None
        self._begin()
        own = sum(other.peer == peer for other in self._line)
        if text in self._line and (len(self._line) > self.waiting or own > max(1, self.waiting // 2)):
            del self._line[text]
            raise BusyError(
                f"{len(self._line)} texts wait at this generation server, {own - 1} of them yours; try again "
                f"later, or another one",
                retry_after=round(self.retry_after, 1),
            )
        return text

    def leave(self, text: QueuedText, seconds: float = 0.0) -> None:
        """The text is over, after ``seconds`` of being made, or is not waited for any more."""
        self._line.pop(text, None)
        if text in self._running:
            del self._running[text]
            self._under_way[text.peer] -= 1
            if not self._under_way[text.peer]:
                del self._under_way[text.peer]
            self._seconds += 0.2 * (seconds - self._seconds)
        self._begin()

    def _begin(self) -> None:
        most = max(1, self.at_once - 1)
        while len(self._running) < self.at_once:
            able = [text for text in self._line if self._under_way[text.peer] < most]
            if not able:
                return
            text = min(able, key=lambda text: self._under_way[text.peer])  # the oldest of equals
            del self._line[text]
            self._running[text] = None
            self._under_way[text.peer] += 1
            text.may_begin.set()


def _positive(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if value <= 0:
        raise InputError(f"head-{attribute.name.replace('_', '-')} must be above 0, got {value}")


@attrs.frozen(kw_only=True)
class GenerationLimits:
    """How much a generation server does for others. Raise `InputError` for values that cannot work."""

    at_once: int = attrs.field(default=8, validator=_positive)
    """Texts that are made at the same time."""
    waiting: int = attrs.field(default=64, validator=_positive)
    """Texts that may wait for their text."""
    queue_timeout: float = attrs.field(default=30.0, validator=_positive)
    """Most seconds that one waits for it."""
    prompt_tokens: int = attrs.field(default=4096, validator=_positive)
    """Longest prompt."""
    new_tokens: int = attrs.field(default=1024, validator=_positive)
    """Longest answer."""
    reader_timeout: float = attrs.field(default=60.0, validator=_positive)
    """Seconds for which a client may take nothing of what it is sent."""

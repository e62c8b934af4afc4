"""Changes of a view, handed to any number of readers that each go at their own pace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from weakref import WeakKeyDictionary

from swarmcore.registry.base import Change
from swarmcore.types import PeerId

READER_BOUND = 1024


class ChangeFeed:
    """Where a registry puts its changes. Each reader gets every change from its creation on.

    When more than ``bound`` changes wait for one reader, those of the same peer are merged into one that
    leads from what the reader saw last to what holds now. So at most ``bound`` changes wait, or two for every
    peer where there are more peers than that.
    """

    def __init__(self, bound: int = READER_BOUND) -> None:
        self._bound = bound
        self._readers: WeakKeyDictionary[ChangeReader, None] = WeakKeyDictionary()
        self._closed = False

    def publish(self, change: Change) -> None:
        for reader in self._readers:
            reader._put(change)

    def reader(self) -> ChangeReader:
        """A new reader; it needs no closing: the feed forgets it when it is garbage."""
        reader = ChangeReader(self._bound)
        self._readers[reader] = None
        if self._closed:
            reader._end()
        return reader

    def close(self) -> None:
        """End all readers once they have read what waits for them."""
        self._closed = True
        for reader in self._readers:
            reader._end()


class ChangeReader(AsyncIterator[Change]):
    """Changes in order, each once; ends when the feed is closed. For one task at a time."""

    def __init__(self, bound: int) -> None:
        self._bound = self._merge_above = bound
        self._waiting: deque[Change] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    async def __anext__(self) -> Change:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.popleft()

    def _put(self, change: Change) -> None:
        self._waiting.append(change)
        if len(self._waiting) > self._merge_above:
            self._waiting = deque(merged(self._waiting))
            # Room for as many again, so that merging costs little for each change.
            self._merge_above = max(self._bound, 2 * len(self._waiting))
        self._wake.set()

    def _end(self) -> None:
        self._ended = True
        self._wake.set()


def merged(changes: Iterable[Change]) -> list[Change]:
    """One change at most for each peer, with the same outcome; where the last one of a peer stood."""
    latest: dict[PeerId, Change] = {}
    for change in changes:
        before = latest.pop(change.info.peer, None)
        if before is None:
            latest[change.info.peer] = change
        elif before.kind == "joined":  # unknown to the reader so far
            if change.kind != "left":
                latest[change.info.peer] = Change("joined", change.info)
        elif change.kind == "left":
            latest[change.info.peer] = change
        else:
            latest[change.info.peer] = Change("updated", change.info)
    return list(latest.values())
